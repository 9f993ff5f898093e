"""The README's examples run as they stand."""

import pathlib
import re

import pytest

README = (pathlib.Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_there_are_two_short_examples():
    assert len(EXAMPLES) == 2
    assert all(len(example.strip().splitlines()) <= 20 for example in EXAMPLES)


@pytest.mark.parametrize("example", EXAMPLES, ids=["dict", "nnx"])
def test_examples_run_and_learn(example, capsys):
    exec(compile(example, "README.md", "exec"), {})
    before, after = (float(x) for x in capsys.readouterr().out.split(" -> "))
    assert after < 0.8 * before


def test_the_commands_are_those_of_continuous_integration():
    commands = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    assert "pip install -e '.[train]' && python train.py\n" in commands
    assert "pip install -e '.[train,test]' && pytest\n" in commands
