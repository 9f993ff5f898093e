"""Flags and errors shared by all commands.

Flags are written with underscores (``--top_p``); hyphens are accepted in their place. Wrong usage
exits with status 2, any other error with 1, each with a one-line message.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TextIO

from loro_jax.errors import TrainingError

# 128 + SIGPIPE: the exit status of a program whose output is no longer read.
NO_READER = 141


class Parser(argparse.ArgumentParser):
    """An argument parser that accepts hyphens for underscores and reports errors in one line.

    Args:
        prog: the command as the user types it.
        description: what the command does; its line breaks are kept.
        settings: further arguments of ``argparse.ArgumentParser``.

    Example:
        >>> parser = Parser("python -m loro_jax generate")
        >>> _ = parser.add_argument("--top_p", type=float)
        >>> parser.parse_args(["--top-p=0.9"]).top_p
        0.9
    """

    def __init__(self, prog: str, description: str | None = None, **settings: Any):
        settings.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(prog=prog, description=description, **settings)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parses arguments after replacing hyphens in option names by underscores."""
        # Here, because argparse's other entry points call this one.
        args = sys.argv[1:] if args is None else list(args)
        return super().parse_known_args(_with_underscores(args), namespace)

    def error(self, message: str) -> NoReturn:
        """Exits with a one-line message and status 2."""
        print(f"error: {message} ({self.prog} --help lists the options)", file=sys.stderr)
        sys.exit(2)


def _with_underscores(arguments: Sequence[str]) -> list[str]:
    """Replaces hyphens in option names by underscores, in the arguments before ``--``."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    named = [
        re.sub(r"^--[A-Za-z][\w-]*", lambda name: "--" + name[0][2:].replace("-", "_"), argument)
        for argument in arguments[:end]
    ]
    return [*named, *arguments[end:]]


class Switch(argparse.Action):
    """An on/off option: ``--bos`` and ``--no_bos``.

    Example:
        >>> parser = Parser("command")
        >>> _ = parser.add_argument("--bos", action=Switch)
        >>> [parser.parse_args(given).bos for given in ([], ["--bos"], ["--no_bos"])]
        [None, True, False]
    """

    def __init__(
        self,
        option_strings: Sequence[str],
        dest: str,
        default: bool | None = None,
        help: str | None = None,
    ):
        both = [*option_strings, *(f"--no_{name[2:]}" for name in option_strings)]
        super().__init__(both, dest, nargs=0, default=default, help=help)

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Stores True for ``--name`` and False for ``--no_name``."""
        setattr(namespace, self.dest, not (option_string or "").startswith("--no_"))


def failing_in_one_line(
    command: Callable[[], int | None], in_its_words: Callable[[str], str] = str
) -> int:
    """Runs a command and reports its errors in one line on standard error.

    Args:
        command: does the work and returns an exit status; None counts as 0.
        in_its_words: rewrites an error message to name the command's own options.

    Returns:
        The exit status: 1 for invalid input or a file that can't be read or written, 130 after an
        interrupt, 141 if the output is no longer read.
    """
    try:
        status = command() or 0
        if sys.stdout is not None:
            # Here and not on exit, where Python would print a traceback if it fails.
            sys.stdout.flush()
        return status
    except BrokenPipeError:
        drop_output(sys.stdout)
        return NO_READER
    except (TrainingError, OSError) as error:
        print(f"error: {in_its_words(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def drop_output(out: TextIO | None) -> None:
    """Discards output that is still buffered: Python would try to flush it again on exit.

    Args:
        out: the stream; ignored unless it is the program's standard output.
    """
    if out is sys.__stdout__ and sys.__stdout__ is not None:
        # The stream keeps its descriptor, which from now on leads nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno())
