"""Runs all measurements that need a GPU or a TPU: ``... accelerator --out=DIR``.

Each runs in a separate process and writes ``DIR/NAME.json`` with the command, the device, the
versions and the date, and ``DIR/NAME.log``. Existing results are not measured again, so the same
command resumes after the time limit. A measurement that fails (out of memory, for example) is
named at the end. The most important ones come first; ``--seconds`` limits the total time: eight
minutes by default, which is enough on an H200.

Unless the environment says otherwise, XLA uses cuBLAS alone for products (tuning Triton's kernels
for the 331 products of a step with exact steps would take minutes), and JAX may use 93% of the
memory, or half of it if PyTorch needs some.
"""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Sequence

from loro_jax.command_line import Parser
from loro_jax.errors import TrainingError

# Steps of 131k tokens, with the fastest rematerialisation for each method.
_STEP = (
    *("--batch_size=512", "--dtype=bfloat16", "--param_dtype=float32", "--methods=full,loro"),
    "--remat=full=dots,loro=rank",
)

# Name -> arguments of ``python -m loro_jax bench``, the most important first.
MEASUREMENTS: dict[str, list[str]] = {
    # The 168 pairs of 1B in one step, compared with the paper's algorithm.
    "exact_step_1b": [
        *("exact_step", "--models=1b", "--layers=24", "--layers_of_others=1", "--rounds=3"),
        "--methods=graph",
    ],
    "train_step_1b": [
        *("train_step", "--models=1b", "--gradient_accumulation=16", "--rounds=3", *_STEP),
    ],
    "train_step_60m": [
        *("train_step", "--models=60m", "--gradient_accumulation=2", "--rounds=5", *_STEP),
    ],
    "train_step_350m": [
        *("train_step", "--models=350m", "--gradient_accumulation=8", "--rounds=3", *_STEP),
    ],
    "inference_1b": [
        *("inference", "--models=1b", "--batch_sizes=1,64", "--dtype=bfloat16"),
        *("--caches=full,values", "--rounds=9"),
    ],
    "profile_1b": [
        *("profile", "--models=1b", "--gradient_accumulation=2", "--rounds=1", *_STEP),
        "--batch_size=64",
    ],
    # The batch size of evaluation and scoring.
    "forward_1b": [
        *("forward", "--models=1b", "--batch_sizes=32", "--dtype=bfloat16", "--rounds=9"),
    ],
    "approximate_step": ["approximate_step", "--models=60m,130m", "--rounds=31"],
    "exact_step_small": [
        *("exact_step", "--models=60m,130m", "--layers=8", "--layers_of_others=1", "--rounds=5"),
        "--methods=graph",
    ],
    "together": ["together", "--models=60m,350m,1b", "--tokens=8192"],
}

# Environment variables of each measurement's process, unless already set.
_VARIABLES = {
    "XLA_FLAGS": "--xla_gpu_enable_triton_gemm=false",
    "XLA_PYTHON_CLIENT_MEM_FRACTION": ".93",
}
_VARIABLES_OF = {
    "exact_step": {"XLA_PYTHON_CLIENT_MEM_FRACTION": ".5"},  # PyTorch uses the rest
    # Kernels inside CUDA graphs can't be attributed to operations.
    "profile": {"XLA_FLAGS": "--xla_gpu_enable_triton_gemm=false --xla_gpu_enable_command_buffer="},
}


def main(arguments: Sequence[str]) -> None:
    """Runs the measurements; see ``--help``."""
    parser = Parser("python -m loro_jax bench accelerator", __doc__)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="directory of the results")
    parser.add_argument(
        "--only", default=",".join(MEASUREMENTS), help="names, separated by commas; default: all"
    )
    parser.add_argument(
        "--seconds", type=float, default=480, help="limit for all of them; default: 480"
    )
    options = parser.parse_args(arguments)
    names = options.only.split(",")
    for name in names:
        if name not in MEASUREMENTS:
            parser.error(f"--only: unknown {name!r}; expected some of {', '.join(MEASUREMENTS)}")
    options.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + options.seconds
    failed = [name for name in names if not _measured(name, options.out, end)]
    if failed:
        raise TrainingError(f"not measured: {', '.join(failed)}; see their logs in {options.out}")


def _measured(name: str, out: pathlib.Path, end: float) -> bool:
    """Runs a measurement unless its result exists; returns whether it exists before ``end``."""
    result = out / f"{name}.json"
    if result.exists():
        print(f"{name}: is there", flush=True)
        return True
    seconds = end - time.monotonic()
    if seconds <= 0:
        print(f"{name}: no time left", flush=True)
        return False
    # Renamed at the end: a result that exists is complete.
    partial = result.with_suffix(".partial")
    program, *_ = arguments = MEASUREMENTS[name]
    command = [sys.executable, "-m", "loro_jax.bench", *arguments, f"--json={partial}"]
    # The user's environment takes precedence.
    variables = {**_VARIABLES, **_VARIABLES_OF.get(program, {}), **os.environ}
    with (out / f"{name}.log").open("w", encoding="utf-8") as log:
        try:
            done = subprocess.run(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                timeout=seconds,
                check=False,
                env=variables,
            )
            outcome = "done" if done.returncode == 0 else f"failed with status {done.returncode}"
        except subprocess.TimeoutExpired:
            outcome = f"stopped after {seconds:.0f} s"
    if outcome == "done":
        partial.replace(result)
    print(f"{name}: {outcome}", flush=True)
    return result.exists()
