"""Parameters and memory of every method for one model, with the figures of the paper's Table 1.

Nothing is allocated. Weights (trained and fixed), their gradients and the optimizer's state are
counted, but not activations; a GB is 1e9 bytes. The paper's Mem column counts weights and optimizer
state in bfloat16, without gradients: the column next to it counts in the same way.

Example:
  python -m loro_jax memory --model=1b --rank=512
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from loro_jax.command_line import Parser, failing_in_one_line
from loro_jax.planning.memory_table import memory_rows
from loro_jax.tables import print_table
from models.llama import PRESETS


def main(arguments: Sequence[str]) -> int:
    """Runs ``python -m loro_jax memory``; returns the exit status."""
    parser = Parser("python -m loro_jax memory", __doc__)
    parser.add_argument("--model", default="60m", help=f"one of {', '.join(PRESETS)}")
    parser.add_argument("--rank", type=int, help="default: the model's in the paper")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(arguments)
    return failing_in_one_line(lambda: _print(options))


def _print(options: argparse.Namespace) -> None:
    rows = memory_rows(options.model, options.rank)
    if options.json:
        print(json.dumps(rows, indent=1))
    else:
        print_table(
            [{name: "" if value is None else value for name, value in row.items()} for row in rows]
        )
