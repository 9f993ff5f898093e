"""Estimated cost of training steps on meshes of devices that are not here, by method.

Each step is compiled as by ``python train.py --dry_run``: for simulated devices, with the times of
an H100, or for the accelerator of ``--accelerator``, if its compiler is installed. Bytes are per
device. Times are lower bounds for the kernels and collectives of a step at an accelerator's peak
(see ``loro_jax/planning/plan.py`` and ``accelerators.py``).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import Any

from loro_jax.bench.options import add_step_options, make_parser, model_changes, parse_options
from loro_jax.bench.steps import step_config
from loro_jax.errors import TrainingError
from loro_jax.planning.accelerators import ACCELERATORS
from loro_jax.planning.dry_run import quiet_partitioner, simulate_devices
from loro_jax.planning.plan import make_plan
from loro_jax.tables import report
from loro_jax.training.config import MeshConfig
from models.llama import PRESETS, preset


def main(arguments: Sequence[str]) -> None:
    """Runs the benchmark; see ``--help``."""
    parser = make_parser("plan", __doc__, "60m", rounds=1)
    parser.add_argument("--meshes", default="8x1x1,1x8x1,1x1x8,2x2x2", help="data x fsdp x tensor")
    parser.add_argument(
        "--accelerator", choices=ACCELERATORS, help="compile for it; default: simulated devices"
    )
    parser.add_argument("--batch_size", type=int, default=512)
    parser.add_argument(
        "--micro_batch", type=int, default=8, help="most sequences per device and micro-batch"
    )
    add_step_options(parser, param_dtype="float32")
    options = parse_options(parser, arguments, PRESETS)
    meshes = [_mesh(text) for text in options.meshes.split(",")]
    if options.accelerator is None:
        # Before JAX makes its devices: their number can't be changed afterwards.
        simulate_devices(max(map(_size, meshes)))
    rows = [
        _row(model, method, mesh, options)
        for model in options.models
        for mesh in meshes
        for method in options.methods.split(",")
    ]
    report(rows, options)


def _mesh(text: str) -> MeshConfig:
    sizes = text.split("x")
    if len(sizes) != 3 or not all(size.isdigit() and int(size) for size in sizes):
        raise TrainingError(f"--meshes: expected sizes such as 2x4x1, but found {text!r}.")
    return MeshConfig(*map(int, sizes))


def _size(mesh: MeshConfig) -> int:
    return math.prod((mesh.data, mesh.fsdp, mesh.tensor))


def _row(model: str, method: str, mesh: MeshConfig, options: argparse.Namespace) -> dict[str, Any]:
    ways = mesh.data * mesh.fsdp
    config = step_config(
        preset(model, **model_changes(options)),
        method,
        options,
        batch_size=options.batch_size,
        gradient_accumulation=max(options.batch_size // (ways * options.micro_batch), 1),
        mesh=mesh,
    )
    with quiet_partitioner(options.accelerator):
        plan = make_plan(config, _size(mesh), options.accelerator)
    name = options.accelerator or "h100"
    accelerator = ACCELERATORS[name]
    computing, exchanging = plan.seconds(accelerator)
    peak = plan.devices * accelerator.flops
    return {
        "model": model,
        "method": method,
        "mesh": f"{mesh.data}x{mesh.fsdp}x{mesh.tensor}",
        "micro-batches": config.gradient_accumulation,
        "parameters M": plan.parameters / 1e6,
        "state GB": plan.state_bytes / 1e9,
        "temporaries GB": plan.temporary_bytes / 1e9,
        "TFLOP": sum(one.flops for one in plan.kernels) / 1e12,
        "sent GB": plan.sent / 1e9,
        "exact step sends GB more": plan.sent_more / 1e9,
        f"{name} computing ms": 1e3 * computing,
        "exchanges ms": 1e3 * exchanging,
        "tokens/s at least": plan.tokens / (computing + exchanging),
        "MFU at least": plan.model_flops / peak / (computing + exchanging),
        "compile s": plan.compile_seconds,
    }
