"""All measurements that need a GPU or a TPU, one after the other: ``... accelerator --out=DIR``.

Each runs in a process of its own, which has the device for itself, and writes ``DIR/NAME.json``
with the command, the device, the versions and the date, and ``DIR/NAME.log``. What is there
already is not measured again, so that the same command goes on where the time has run out. A
measurement that fails (does not fit into the memory, say) is named at the end.
"""

from __future__ import annotations

import argparse
import pathlib
import subprocess
import sys
from collections.abc import Sequence

# Name -> arguments of ``python -m loro_jax.bench``, the most wanted first.
MEASUREMENTS: dict[str, list[str]] = {
    # The 168 pairs of 1B in one step, against the paper's algorithm.
    "exact_step_1b": [
        *("exact_step", "--models=1b", "--layers=24", "--layers_of_others=1", "--rounds=5"),
    ],
    "approximate_step": ["approximate_step", "--models=60m,130m", "--rounds=31"],
    # Steps of 131k tokens; "loro exact" less "loro" over K steps is what exact steps cost.
    "train_step_350m": [
        *("train_step", "--models=350m", "--batch_size=512", "--gradient_accumulation=4"),
        *("--dtype=bfloat16", "--param_dtype=float32", "--remat=none", "--rounds=5"),
    ],
    "train_step_1b": [
        *("train_step", "--models=1b", "--batch_size=512", "--gradient_accumulation=16"),
        *("--dtype=bfloat16", "--param_dtype=float32", "--remat=dots", "--rounds=5"),
    ],
    "train_step_1b_bf16": [
        *("train_step", "--models=1b", "--batch_size=512", "--gradient_accumulation=16"),
        *("--dtype=bfloat16", "--param_dtype=bfloat16", "--remat=dots", "--rounds=5"),
    ],
    "inference_1b": [
        *("inference", "--models=1b", "--batch_sizes=1,8,64", "--dtype=bfloat16"),
        *("--caches=full,values", "--rounds=9"),
    ],
    # Batches of the size that evaluation and scoring use.
    "forward": [
        *("forward", "--models=350m,1b", "--batch_sizes=1,8,32", "--lengths=256,1024"),
        *("--dtype=bfloat16", "--rounds=9"),
    ],
    "together": ["together", "--models=60m,350m,1b", "--tokens=8192"],
    "exact_step_small": [
        *("exact_step", "--models=60m,130m", "--layers=8", "--layers_of_others=1", "--rounds=5"),
    ],
    "data": ["data", "--steps=20"],
}


def main(arguments: Sequence[str]) -> None:
    """Runs the measurements; see ``--help``."""
    parser = argparse.ArgumentParser(
        prog="python -m loro_jax.bench accelerator",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=pathlib.Path, required=True, help="directory of the results")
    parser.add_argument(
        "--only", default=",".join(MEASUREMENTS), help="names, separated by commas; default: all"
    )
    parser.add_argument("--seconds", type=float, default=600, help="that each may take at most")
    options = parser.parse_args(arguments)
    names = options.only.split(",")
    for name in names:
        if name not in MEASUREMENTS:
            parser.error(f"--only: unknown {name!r}; expected some of {', '.join(MEASUREMENTS)}")
    options.out.mkdir(parents=True, exist_ok=True)
    failed = [name for name in names if not _measured(name, options.out, options.seconds)]
    if failed:
        sys.exit(f"error: not measured: {', '.join(failed)}; see their logs in {options.out}")


def _measured(name: str, out: pathlib.Path, seconds: float) -> bool:
    """Whether a result is there, or has been made."""
    result = out / f"{name}.json"
    if result.exists():
        print(f"{name}: is there", flush=True)
        return True
    partial = result.with_suffix(".partial")
    command = [sys.executable, "-m", "loro_jax.bench", *MEASUREMENTS[name], f"--json={partial}"]
    with (out / f"{name}.log").open("w", encoding="utf-8") as log:
        try:
            done = subprocess.run(
                command, stdout=log, stderr=subprocess.STDOUT, timeout=seconds, check=False
            )
            outcome = "done" if done.returncode == 0 else f"failed with status {done.returncode}"
        except subprocess.TimeoutExpired:
            outcome = f"stopped after {seconds:g} s"
    if outcome == "done":
        partial.replace(result)
    print(f"{name}: {outcome}", flush=True)
    return result.exists()
