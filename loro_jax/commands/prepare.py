"""Encodes a text once, into shards of tokens that runs read; verify checks them.

Use DIR as config.data.source of a run. Run the same command again to resume after an interruption.

Example:
  python -m loro_jax prepare embedded --tokenizer=embedded --out=shards
  python -m loro_jax verify shards
"""

from __future__ import annotations

import argparse
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from loro_jax.command_line import Parser, failing_in_one_line
from loro_jax.commands.source_options import add_source_options, naming_options, source_config
from loro_jax.errors import TrainingError
from loro_jax.text import prepare as preparation
from loro_jax.text.prepared import verify
from loro_jax.text.tokenizers.tokenizer import load_tokenizer

# Seconds between lines if the output is not a terminal.
_LINE_EVERY = 30.0


def main(arguments: Sequence[str]) -> int:
    """Runs ``python -m loro_jax prepare``; returns the exit status."""
    parser = Parser("python -m loro_jax prepare", __doc__)
    add_source_options(parser)
    parser.add_argument("--tokenizer", required=True, help="as config.data.tokenizer")
    parser.add_argument("--eos_id", type=int, help="the tokenizer's by default")
    parser.add_argument("--out", required=True, metavar="DIR", help="directory to write")
    parser.add_argument("--shard_tokens", type=int, default=preparation.SHARD_TOKENS)
    parser.add_argument("--threads", type=int, default=0, help="0: one per core")
    options = parser.parse_args(arguments)
    return failing_in_one_line(lambda: _prepare(options), naming_options)


def verify_main(arguments: Sequence[str]) -> int:
    """Runs ``python -m loro_jax verify``; returns the exit status."""
    parser = Parser("python -m loro_jax verify", __doc__)
    parser.add_argument("directory", metavar="DIR", help="directory written by prepare")
    options = parser.parse_args(arguments)
    return failing_in_one_line(lambda: _verify(pathlib.Path(options.directory)))


def _prepare(options: argparse.Namespace) -> int:
    for name, least in (("shard_tokens", 1), ("threads", 0)):
        if getattr(options, name) < least:
            raise TrainingError(f"--{name}={getattr(options, name)}: expected at least {least}.")
    config = source_config(options)
    config.tokenizer = options.tokenizer
    tokenizer = load_tokenizer(options.tokenizer, options.eos_id)
    with _Display() as display:
        manifest = preparation.prepare(
            config,
            tokenizer,
            options.out,
            shard_tokens=options.shard_tokens,
            threads=options.threads,
            report=display.show,
        )
    print(_summary(options.out, manifest))
    return 0


def _summary(out: str, manifest: dict[str, Any]) -> str:
    counts = ", ".join(
        f"{split} {found['documents']:,} documents with {found['tokens']:,} tokens"
        for split, found in manifest["splits"].items()
    )
    return "\n".join([f"{out}: {counts}, {len(manifest['shards'])} shards", *manifest["notes"]])


def _verify(directory: pathlib.Path) -> int:
    problems = verify(directory)
    for problem in problems:
        print(problem, file=sys.stderr)
    if not problems:
        print(f"{directory}: all bytes as they were written")
    return 1 if problems else 0


class _Display:
    """A progress bar on a terminal, occasional lines otherwise."""

    def __init__(self) -> None:
        self._console = Console(highlight=False, soft_wrap=True)
        self._bar = Progress(
            TextColumn("part"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed}/{task.total}  {task.fields[status]}"),
            console=self._console,
        )
        self._task = self._bar.add_task("prepare", total=None, status="")
        self._last = time.monotonic()
        self.show: Callable[[preparation.Progress], None] = (
            self._update if self._console.is_terminal else self._print
        )

    def _update(self, done: preparation.Progress) -> None:
        self._bar.update(self._task, completed=done.part, total=done.parts, status=_status(done))

    def _print(self, done: preparation.Progress) -> None:
        if time.monotonic() - self._last > _LINE_EVERY:
            self._last = time.monotonic()
            self._console.print(f"part {done.part + 1}/{done.parts}  {_status(done)}")

    def __enter__(self) -> _Display:
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._bar.stop()


def _status(done: preparation.Progress) -> str:
    rate = done.new_tokens / max(done.seconds, 1e-9)
    return f"{done.documents:,} documents, {done.tokens:,} tokens, {rate:,.0f} tokens/s"
