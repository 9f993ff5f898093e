"""One door: what ``python -m loro_jax`` lists, how its flags are read, and the old spellings."""

import re
import runpy
import shlex
import sys
import warnings

import pytest

from loro_jax.__main__ import COMMANDS, main
from loro_jax.command_line import Parser, Switch, failing_in_one_line
from loro_jax.errors import TrainingError

EXAMPLE = re.compile(r"^  (python -m loro_jax (?:.*\\\n)*.*)$", re.MULTILINE)


class ParsedError(Exception):
    """A command's options were read."""


def parse_only(self, arguments=None, namespace=None):
    """``Parser.parse_args`` that ends a command as soon as it has read its options."""
    options, rest = self.parse_known_args(arguments, namespace)
    if rest:
        self.error(f"unrecognized arguments: {' '.join(rest)}")
    raise ParsedError(options)


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_all_commands_are_listed_with_a_line_each(arguments, capsys):
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: python -m loro_jax NAME")
    for name, command in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(command.summary)}$", out, re.MULTILINE)


@pytest.mark.parametrize(
    ("name", "likely"), [("genrate", "generate"), ("exports", "export"), ("evalaute", "evaluate")]
)
def test_the_nearest_command_is_suggested(name, likely, capsys):
    assert main([name]) == 2
    error = capsys.readouterr().err
    assert error == (
        f"error: there is no command {name!r}; did you mean {likely!r}? "
        "(python -m loro_jax lists them)\n"
    )


def test_a_name_like_no_command_has_no_suggestion(capsys):
    assert main(["xyzzy"]) == 2
    assert "did you mean" not in capsys.readouterr().err


def help_of(name, capsys):
    try:
        status = main([name, "--help"])
    except SystemExit as end:
        status = end.code
    assert status == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example_whose_options_exist(name, capsys, monkeypatch):
    examples = EXAMPLE.findall(help_of(name, capsys))
    called = [shlex.split(example.replace("\\\n", " "))[3:] for example in examples]
    assert name in {words[0] for words in called}
    monkeypatch.setattr(Parser, "parse_args", parse_only)
    for words in called:
        with pytest.raises(ParsedError):
            main(words)


@pytest.mark.parametrize("name", COMMANDS)
def test_flags_have_underscores(name, capsys):
    flags = re.findall(r"(?<![\w-])--[a-z][\w-]*", help_of(name, capsys))
    assert [flag for flag in flags if "-" in flag[2:]] == []


def parser():
    made = Parser("command")
    made.add_argument("text", nargs="*")
    made.add_argument("--top_p", type=float)
    made.add_argument("--parse_special", action=Switch, default=True)
    return made


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--top_p=0.5"], (0.5, True, [])),
        (["--top-p=0.5", "a-b"], (0.5, True, ["a-b"])),
        (["--top-p", "0.5", "--no-parse-special"], (0.5, False, [])),
        (["--no_parse_special"], (None, False, [])),
        (["--no_parse_special", "--parse-special"], (None, True, [])),
        (["--", "--top-p"], (None, True, ["--top-p"])),
        (["x=--a-b"], (None, True, ["x=--a-b"])),
    ],
)
def test_hyphens_in_names_of_flags_are_read_as_underscores(arguments, expected):
    options = parser().parse_args(arguments)
    assert (options.top_p, options.parse_special, options.text) == expected


def test_values_of_flags_keep_their_hyphens():
    made = Parser("command")
    made.add_argument("--set_it", action="append")
    assert made.parse_args(["--set-it=a-b=--c-d"]).set_it == ["a-b=--c-d"]


def test_a_wrong_usage_is_one_line_and_status_2(capsys):
    for bad in (["--top_p=x"], ["--topp=1"]):
        with pytest.raises(SystemExit) as end:
            parser().parse_args(bad)
        error = capsys.readouterr().err
        assert (end.value.code, error.count("\n")) == (2, 1)
        assert error.startswith("error: ")
        assert "command --help" in error


@pytest.mark.parametrize(
    ("raised", "status", "line"),
    [
        (TrainingError("config.a = 1"), 1, "error: --a = 1\n"),
        (OSError(28, "No space left on device", "x"), 1, "error: [Errno 28] No space left"),
        (KeyboardInterrupt(), 130, "stopped\n"),
        (BrokenPipeError(), 141, ""),
        (None, 0, ""),
    ],
)
def test_errors_become_one_line(raised, status, line, capsys):
    def command():
        if raised is not None:
            raise raised

    assert failing_in_one_line(command, lambda text: text.replace("config.", "--")) == status
    error = capsys.readouterr().err
    assert error.startswith(line)
    assert error.count("\n") == bool(line)


def test_what_is_no_users_error_keeps_its_traceback():
    def command():
        raise RuntimeError("a defect")

    with pytest.raises(RuntimeError, match="a defect"):
        failing_in_one_line(command)


MOVED = [
    ("models.generate", ["runs/x", "--prompt=a", "--top-p=0.9"], "generate"),
    ("models.evaluate", ["runs/x", "embedded", "--batch-size=2"], "evaluate"),
    ("models.huggingface", ["export", "runs/x", "out", "--keep-factors"], "export"),
    ("models.huggingface", ["import", "x", "out", "--attn-rank=2"], "import"),
    ("loro_jax.memory", ["--model=60m"], "memory"),
    ("loro_jax.training.tokenizer", ["train", "a.txt", "--out=a.json"], "tokenizer"),
]
SAME = [
    ("loro_jax.bench", ["exact_step", "--models=60m"]),
    ("loro_jax.bench", ["stability", "runs"]),
    ("loro_jax.compare", ["configs/default.py:paper", "--methods=", "--arm=a=loro"]),
    ("loro_jax.training.data", ["prepare", "a.txt", "--tokenizer=bytes", "--out=x"]),
    ("loro_jax.training.data", ["verify", "x"]),
]


def call(module, arguments, monkeypatch):
    """Runs ``python -m MODULE`` up to its options."""
    monkeypatch.setattr(Parser, "parse_args", parse_only)
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    with warnings.catch_warnings():
        # Other tests have imported the module; it stays the one that they know.
        warnings.filterwarnings("ignore", ".*found in sys.modules after import", RuntimeWarning)
        with pytest.raises(ParsedError) as parsed:
            runpy.run_module(module, run_name="__main__")
    return parsed.value.args[0]


@pytest.mark.parametrize(("module", "arguments", "name"), MOVED)
def test_old_spellings_say_where_they_went_and_run(module, arguments, name, monkeypatch, capsys):
    options = call(module, arguments, monkeypatch)
    assert capsys.readouterr().err == f"moved: python -m loro_jax {name}\n"
    if name == "tokenizer":
        assert options.source == "a.txt"


@pytest.mark.parametrize(("module", "arguments"), SAME)
def test_other_spellings_work_without_a_word(module, arguments, monkeypatch, capsys):
    call(module, arguments, monkeypatch)
    assert capsys.readouterr().err == ""
