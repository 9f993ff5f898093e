"""``python -m loro_jax bench NAME [options]``."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence

from loro_jax.command_line import failing_in_one_line

BENCHMARKS = {
    "accelerator": "all measurements of an accelerator, one after the other",
    "approximate_step": "LORO's approximate step beside optax.adamw",
    "cost": "FLOPs, parameters and state over models, ranks, lengths and K",
    "data": "how fast text becomes batches",
    "exact_step": "the exact step, ours and the paper's",
    "forward": "batches through the model: logits and scores",
    "inference": "prompts and tokens per second, dense and low-rank",
    "levers": "one thing changed in a training step at a time",
    "memory_fit": "the largest batches that fit a device",
    "plan": "steps on meshes of devices that are not there",
    "profile": "where the time of a training step goes",
    "together": "projections of one input, computed together or each",
    "train_step": "whole training steps, methods in turns",
}

# Where it used to be called; it reads runs, and measures nothing.
_ELSEWHERE = {"stability": "loro_jax.study.stability"}


def main(arguments: Sequence[str]) -> int:
    """Runs the benchmark that the first argument names; returns the exit status."""
    name, *rest = arguments or [""]
    if name in ("-h", "--help"):
        print(_overview())
        return 0
    if name not in (*BENCHMARKS, *_ELSEWHERE):
        likely = difflib.get_close_matches(name, BENCHMARKS, n=1)
        hint = f"; did you mean {likely[0]!r}?" if likely else ""
        print(
            f"usage: python -m loro_jax bench {{{','.join(BENCHMARKS)}}} [options]{hint}",
            file=sys.stderr,
        )
        return 2
    module = _ELSEWHERE.get(name, f"loro_jax.bench.{name}")
    return failing_in_one_line(lambda: importlib.import_module(module).main(rest))


def _overview() -> str:
    width = max(map(len, BENCHMARKS)) + 2
    lines = [f"  {name:{width}}{summary}" for name, summary in BENCHMARKS.items()]
    return "\n".join(
        [
            "usage: python -m loro_jax bench NAME [options]",
            "",
            "Each prints a table; --json=FILE writes it with the versions and the machine.",
            "",
            *lines,
            "",
            "Example:",
            "  python -m loro_jax bench exact_step --models=60m --rounds=3",
        ]
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
