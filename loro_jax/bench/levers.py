"""Time and memory of variants of the same training step, one change at a time, in turns.

``time / base`` is the median ratio to the library's own step, by rounds; below one is faster.
``memory / base`` compares the memory of the compiled steps: state, results and temporaries, without
buffers shared by donation. Losses agree up to rounding, except for ``bfloat16``.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import unittest.mock
from collections.abc import Sequence
from typing import Any, NamedTuple

from loro_jax.bench.options import add_set_option, make_parser, parse_options
from loro_jax.bench.steps import step_config
from loro_jax.layers import packing
from loro_jax.planning.measured_step import Case, prepare
from loro_jax.planning.timing import rounds_in_turns
from loro_jax.tables import report
from loro_jax.training.config import Config
from loro_jax.training.fields import apply_changes
from models.llama import PRESETS, preset


class _Lever(NamedTuple):
    """A variant: changed fields of the config, or a changed choice of the code."""

    changes: Sequence[str] = ()
    donate: bool = True
    pack: bool = True


def levers(config: Config) -> dict[str, _Lever]:
    """Returns all variants by name; "base" is the unchanged step."""
    tokens = config.batch_size * config.sequence_length
    return {
        "base": _Lever(),
        "buffers not donated": _Lever(donate=False),
        "layers unrolled": _Lever([f"model.unroll={config.model.num_layers}"]),
        "each A separately": _Lever(pack=False),
        "attention as one square": _Lever(["model.attention=whole"]),
        "all logits at once": _Lever([f"model.loss_chunk_size={tokens}"]),
        "logits of 512 tokens": _Lever(["model.loss_chunk_size=512"]),
        "remat: none": _Lever(["model.remat=none"]),
        "remat: rank": _Lever(["model.remat=rank"]),
        "remat: full": _Lever(["model.remat=full"]),
        "two micro-batches": _Lever(["gradient_accumulation=2"]),
        "four micro-batches": _Lever(["gradient_accumulation=4"]),
        "bfloat16 activations": _Lever(["model.dtype=bfloat16"]),
    }


def main(arguments: Sequence[str]) -> None:
    """Runs the benchmark; see ``--help``."""
    parser = make_parser("levers", __doc__, "60m", rounds=5)
    parser.add_argument("--method", default="loro", help="default loro")
    parser.add_argument("--batch_size", type=int, default=8, help="sequences per step")
    parser.add_argument("--sequence_length", type=int, default=256)
    parser.add_argument("--only", help="names of variants, separated by commas; default: all")
    add_set_option(parser)
    options = parse_options(parser, arguments, PRESETS)
    rows = []
    for name in options.models:
        known = levers(_config(name, options, ()))
        chosen = ["base", *options.only.split(",")] if options.only else list(known)
        for lever in chosen:
            if lever not in known:
                parser.error(f"--only: unknown {lever!r}; expected some of {', '.join(known)}")
        cases = {
            lever: _prepare(_config(name, options, known[lever].changes), known[lever])
            for lever in chosen
        }
        rows += _rows(name, cases, options.rounds)
    report(rows, options)


def _rows(name: str, cases: dict[str, Case], rounds: int) -> list[dict[str, Any]]:
    seconds = rounds_in_turns({lever: case.step for lever, case in cases.items()}, rounds)
    base_memory = cases["base"].held_bytes

    def relative(lever: str) -> list[float]:
        # Ratios within a round: a machine that slows down between rounds does not change them.
        return [own / base for own, base in zip(seconds[lever], seconds["base"], strict=True)]

    return [
        {
            "model": name,
            "lever": lever,
            "time / base": statistics.median(relative(lever)),
            "least": min(relative(lever)),
            "most": max(relative(lever)),
            "memory / base": case.held_bytes / base_memory,
        }
        for lever, case in cases.items()
    ]


def _config(name: str, options: argparse.Namespace, changes: Sequence[str]) -> Config:
    config = step_config(
        preset(name),
        options.method,
        options,
        exact_every=10_000,
        batch_size=options.batch_size,
    )
    apply_changes(config, changes)
    config.validate()
    return config


def _prepare(config: Config, lever: _Lever) -> Case:
    # A threshold beyond any step's rows turns packing off.
    fewest = packing.ROWS_WORTH_PACKING if lever.pack else sys.maxsize
    with unittest.mock.patch.object(packing, "ROWS_WORTH_PACKING", fewest):
        return prepare(config, donate=lever.donate)
