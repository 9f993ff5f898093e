r"""Shows a table of tasks and methods from runs on GLUE, as the paper's Table 6.

Each cell is 100 times the task's metric (Matthews for CoLA, Pearson for STS-B, F1 for MRPC,
accuracy for the others): the best evaluation of a run, or the last one with --last, as a mean over
seeds. Of several learning rates the best one is shown. MNLI is on the matched split.

Example:
  python -m loro_jax glue runs/glue
"""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Sequence

from loro_jax.command_line import Parser, failing_in_one_line
from loro_jax.study.glue_table import read_results, table
from loro_jax.tables import report


def main(arguments: Sequence[str]) -> int:
    """Runs ``python -m loro_jax glue``; returns the exit status."""
    parser = Parser("python -m loro_jax glue", __doc__)
    parser.add_argument(
        "directories", metavar="DIR", nargs="+", type=pathlib.Path, help="runs, or folders of runs"
    )
    parser.add_argument("--last", action="store_true", help="last evaluations, not the best ones")
    parser.add_argument("--json", help="write the results to this file, too")
    options = parser.parse_args(arguments)
    options.command = " ".join([parser.prog, *arguments])
    return failing_in_one_line(lambda: _show(options))


def _show(options: argparse.Namespace) -> None:
    results = read_results(options.directories)
    report(table(results, "last" if options.last else "best"), options)
    for one in results:
        if one.step < one.steps:
            print(f"{one.name}: at step {one.step} of {one.steps}")
