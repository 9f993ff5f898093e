"""``python -m loro_jax.bench NAME [options]``."""

import importlib
import sys

BENCHMARKS = (
    "accelerator",
    "approximate_step",
    "cost",
    "data",
    "exact_step",
    "forward",
    "inference",
    "levers",
    "memory_fit",
    "plan",
    "profile",
    "stability",
    "together",
    "train_step",
)


def main(arguments: list[str]) -> None:
    """Runs the benchmark that the first argument names."""
    if not arguments or arguments[0] not in BENCHMARKS:
        sys.exit(f"usage: python -m loro_jax.bench {{{','.join(BENCHMARKS)}}} [options]")
    room = "study" if arguments[0] == "stability" else "bench"
    importlib.import_module(f"loro_jax.{room}.{arguments[0]}").main(arguments[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
