"""The READMEs keep their word: examples run, links, files, commands and fields exist."""

import glob
import importlib
import importlib.util
import itertools
import re

import pytest

from tests.conftest import ROOT

README = ROOT / "README.md"
READMES = [
    README,
    *sorted((ROOT / "loro_jax").rglob("README.md")),
    *sorted((ROOT / "models").rglob("README.md")),
]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in READMES}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
EXAMPLES = {
    f"{name}#{number}": body
    for name, text in TEXTS.items()
    for number, body in enumerate(
        body for language, body in BLOCK.findall(text) if language == "python"
    )
}
# A first part of a path that says: this is a file or a folder of the repository.
FOLDERS = ("loro_jax", "models", "configs", "tests", "results", ".ci", "train.py")


def in_code(text):
    """Everything set as code but Python: blocks, then spans, each on one line."""
    blocks = [(language, body) for language, body in BLOCK.findall(text)]
    spans = re.findall(r"`([^`]+)`", BLOCK.sub("", text))
    bodies = [body.replace("\\\n", " ") for language, body in blocks if language != "python"]
    lines = [line for body in bodies for line in body.splitlines()]
    return lines + [" ".join(span.split()) for span in spans]


def alternatives(path):
    """``a_{b,c}.json`` as ``a_b.json`` and ``a_c.json``."""
    parts = re.split(r"\{([^}]*)\}", path)
    choices = [part.split(",") if i % 2 else [part] for i, part in enumerate(parts)]
    return ["".join(chosen) for chosen in itertools.product(*choices)]


def named_paths(text):
    """Paths of the repository in code, without what a config's path has after its colon."""
    for line in in_code(text):
        for word in line.split():
            path = word.rpartition("=")[2].strip("'\"").split(":")[0]
            if re.fullmatch(r"[\w.*{},/-]+", path) and path.split("/")[0] in FOLDERS:
                yield from alternatives(path.rstrip(".,"))


def slug(heading):
    """The anchor of a heading, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def commands(text):
    """The words after ``python -m`` of every command."""
    for line in in_code(text):
        for rest in re.findall(r"python -m ([\w. -]*)", line):
            if rest.split() != ["loro_jax", "NAME"]:
                yield rest.split()


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_run_and_learn(name, capsys):
    exec(compile(EXAMPLES[name], name, "exec"), {})
    printed = capsys.readouterr().out
    assert printed
    if " -> " in printed:
        before, after = (float(x) for x in printed.splitlines()[-1].split(" -> "))
        assert after < 0.8 * before


def test_the_examples_are_found():
    assert sum(name.startswith("README.md#") for name in EXAMPLES) >= 2


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_somewhere(name):
    for target in re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", TEXTS[name])):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        found = (ROOT / name).parent / path if path else ROOT / name
        assert found.exists(), f"{name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", found.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in map(slug, headings), f"{name}: {target}"


@pytest.mark.parametrize("name", TEXTS)
def test_named_files_exist(name):
    places = (ROOT, (ROOT / name).parent)
    for path in named_paths(TEXTS[name]):
        assert any(glob.glob(str(place / path)) for place in places), f"{name}: {path}"


@pytest.mark.parametrize("name", TEXTS)
def test_named_objects_exist(name):
    for line in in_code(TEXTS[name]):
        for dotted in re.findall(r"(?<![\w./=-])(?:loro_jax|models)(?:\.\w+)+(?!/)", line):
            assert locate(dotted), f"{name}: {dotted}"


def locate(dotted):
    """Whether a dotted name is a module, or an attribute of one."""
    parent, _, name = dotted.rpartition(".")
    try:
        return hasattr(importlib.import_module(parent), name) or bool(
            importlib.util.find_spec(dotted)
        )
    except ModuleNotFoundError:
        return False


@pytest.mark.parametrize("name", TEXTS)
def test_named_commands_exist(name):
    if importlib.util.find_spec("loro_jax.__main__") is None:
        pytest.skip("python -m loro_jax is not there")
    benchmarks = importlib.import_module("loro_jax.bench.__main__").BENCHMARKS
    for module, *words in commands(TEXTS[name]):
        assert importlib.util.find_spec(module), f"{name}: python -m {module}"
        if module == "loro_jax":
            known = importlib.import_module("loro_jax.__main__").COMMANDS
            assert words[0] in known, f"{name}: python -m loro_jax {words[0]}"
        if (module, *words)[:2] == ("loro_jax", "bench"):
            assert words[1] in benchmarks, f"{name}: python -m loro_jax bench {words[1]}"


def flags_of_commands():
    """The words of every ``python -m loro_jax`` command, and the flags that READMEs give it."""
    flags = {}
    for line in itertools.chain.from_iterable(map(in_code, TEXTS.values())):
        for rest in re.findall(r"python -m loro_jax (\w.*)", line):
            words = rest.split()
            if words[0] == "NAME":
                continue
            command = tuple(words[: 2 if words[0] == "bench" else 1])
            flags.setdefault(command, set()).update(re.findall(r"(?<!\S)--[\w-]+", rest))
    return flags


@pytest.mark.parametrize("command", flags_of_commands(), ids=" ".join)
def test_named_flags_exist(command, capsys):
    if importlib.util.find_spec("loro_jax.__main__") is None:
        pytest.skip("python -m loro_jax is not there")
    main = importlib.import_module("loro_jax.__main__").main
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    assert ended.value.code == 0
    known = re.findall(r"--[\w-]+", capsys.readouterr().out)
    assert flags_of_commands()[command] <= set(known)


@pytest.mark.parametrize("name", TEXTS)
def test_named_fields_exist(name):
    fields = importlib.import_module("loro_jax.training.help").known_fields()
    for line in in_code(TEXTS[name]):
        for field in re.findall(r"--config\.([\w.]+)", line):
            assert field in [*fields, "NAME"], f"{name}: --config.{field}"


def test_the_commands_are_those_of_continuous_integration():
    lines = TEXTS["README.md"].splitlines()
    assert "pip install -e '.[train]' && python train.py" in lines
    assert "pip install -e '.[train,test]' && pytest" in lines
