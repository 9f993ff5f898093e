"""Options shared by benchmarks."""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Collection, Sequence
from typing import Any

from loro_jax.command_line import Parser


def make_parser(name: str, doc: str | None, models: str, rounds: int) -> Parser:
    """Returns a parser with the options shared by all benchmarks of models.

    Args:
        name: name of the benchmark.
        doc: its description.
        models: default of ``--models``.
        rounds: default of ``--rounds``.

    Returns:
        The parser.
    """
    parser = Parser(f"python -m loro_jax bench {name}", doc)
    parser.add_argument("--models", default=models, help=f"comma-separated, default {models}")
    parser.add_argument("--rounds", type=int, default=rounds, help=f"default {rounds}")
    parser.add_argument("--json", help="write the results to this file, too")
    return parser


def add_step_options(
    parser: Parser,
    *,
    methods: str = "full,loro",
    dtype: str = "bfloat16",
    param_dtype: str | None = "bfloat16",
    remat: str = "dots",
) -> None:
    """Adds the options shared by benchmarks of whole steps; the arguments are defaults."""
    parser.add_argument("--methods", default=methods, help=f"comma-separated, default {methods}")
    parser.add_argument("--sequence_length", type=int, default=256)
    parser.add_argument("--dtype", default=dtype, help="dtype of activations and products")
    parser.add_argument(
        "--param_dtype", default=param_dtype, help="dtype of weights; default: as --dtype"
    )
    parser.add_argument("--remat", default=remat, help="none, rank, dots or full")
    add_set_option(parser)


def add_set_option(parser: Parser) -> None:
    """Adds ``--set FIELD=VALUE``."""
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="set a config field"
    )


def model_changes(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the fields of a model that are set by options of :func:`add_step_options`."""
    return {
        "dtype": options.dtype,
        "param_dtype": options.param_dtype or options.dtype,
        "remat": options.remat,
    }


def whole_numbers(parser: Parser, options: argparse.Namespace, *names: str) -> list[list[int]]:
    """Returns options that list whole numbers above 0 as lists; exits for other values.

    Args:
        parser: reports invalid values.
        options: the parsed options.
        names: names of the options, without dashes.

    Returns:
        A list for each name.

    Example:
        >>> options = argparse.Namespace(ranks="8,16")
        >>> whole_numbers(Parser("command"), options, "ranks")
        [[8, 16]]
    """
    found = []
    for name in names:
        numbers = getattr(options, name).split(",")
        if not all(number.isdecimal() and int(number) for number in numbers):
            parser.error(
                f"--{name}={getattr(options, name)}: expected whole numbers above 0, separated by "
                "commas"
            )
        found.append([int(number) for number in numbers])
    return found


def parse_options(
    parser: argparse.ArgumentParser, arguments: Sequence[str], known: Collection[str]
) -> argparse.Namespace:
    """Returns the options, with ``models`` as a list of known names."""
    options = parser.parse_args(arguments)
    options.command = " ".join([parser.prog, *arguments])
    folder = pathlib.Path(options.json or ".").absolute().parent
    if not folder.is_dir():
        parser.error(f"--json={options.json}: there is no directory {folder}")
    options.models = options.models.split(",")
    for model in options.models:
        if model not in known:
            parser.error(f"--models: unknown model {model!r}; expected {', '.join(known)}")
    return options
