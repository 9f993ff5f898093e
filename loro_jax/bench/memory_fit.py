"""Largest batch of each model that fits into the memory of one device, dense and low-rank.

The batch follows from the memory analysis of compiled training steps; nothing is allocated and no
accelerator is needed. For small batches temporaries are those of the optimizer; above some size
they grow linearly with the batch. Each step is compiled for two batches beyond that size and
extrapolated. Steps are compiled for CPU, which computes bfloat16 products in float32 and holds
copies of their operands: an accelerator needs less.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NamedTuple

from loro_jax.bench.options import add_step_options, make_parser, model_changes, parse_options
from loro_jax.bench.steps import step_config
from loro_jax.planning.plan import make_plan
from loro_jax.tables import report
from models.llama import PRESETS, preset

# The first two batches, the largest one to try, and the relative growth from one to the next above
# which temporaries are considered those of the batch.
_BATCHES = (8, 24)
_LARGEST = 4096
_LEAST_GROWTH = 0.1


class Need(NamedTuple):
    """Bytes of a step: parameters and state, and temporaries linear in the batch."""

    state: int
    fixed: float
    per_sequence: float

    def largest_batch(self, memory: float) -> int:
        """Returns the number of sequences that fit; 0 if none does."""
        return max(int((memory - self.state - self.fixed) / max(self.per_sequence, 1.0)), 0)


def need_of(low: tuple[int, int, int], high: tuple[int, int, int]) -> Need:
    """Fits a line through two compiled steps.

    Args:
        low: batch size, bytes of the state, bytes of temporaries.
        high: the same for a larger batch.

    Example:
        >>> need_of((8, 100, 50), (16, 100, 90))
        Need(state=100, fixed=10.0, per_sequence=5.0)
        >>> need_of((8, 100, 50), (16, 100, 90)).largest_batch(165)
        11
    """
    slope = (high[2] - low[2]) / (high[0] - low[0])
    return Need(low[1], low[2] - slope * low[0], slope)


def main(arguments: Sequence[str]) -> None:
    """Runs the benchmark; see ``--help``."""
    parser = make_parser("memory_fit", __doc__, "60m,130m,350m,1b,7b", rounds=1)
    parser.add_argument("--memory", default="16,24,40,80,141", help="memory of devices, GB (1e9)")
    add_step_options(parser, remat="full")
    options = parse_options(parser, arguments, PRESETS)
    try:
        memories = [float(size) for size in options.memory.split(",")]
    except ValueError:
        parser.error(f"--memory: expected numbers of GB, not {options.memory!r}")
    rows = [
        _row(model, method, memories, options)
        for model in options.models
        for method in options.methods.split(",")
    ]
    report(rows, options)


def _row(
    model: str, method: str, memories: Sequence[float], options: argparse.Namespace
) -> dict[str, Any]:
    low, high = (_compiled(model, method, batch, options) for batch in _BATCHES)
    # Still the optimizer's temporaries, which do not depend on the batch: larger batches.
    while high[2] - low[2] < _LEAST_GROWTH * low[2] and high[0] < _LARGEST:
        low, high = high, _compiled(model, method, 4 * high[0], options)
    need = need_of(low, high)
    fits = {f"batch in {size:g} GB": need.largest_batch(1e9 * size) for size in memories}
    return {
        "model": model,
        "method": method,
        "state GB": need.state / 1e9,
        "temporaries GB": need.fixed / 1e9,
        "and MB a sequence": need.per_sequence / 1e6,
        **fits,
    }


def _compiled(
    model: str, method: str, batch: int, options: argparse.Namespace
) -> tuple[int, int, int]:
    llama = preset(model, **model_changes(options))
    config = step_config(llama, method, options, batch_size=batch)
    plan = make_plan(config, 1)
    return batch, plan.state_bytes, plan.temporary_bytes
