"""``python train.py --dry_run``: estimates a run's memory, time and communication."""

from __future__ import annotations

import collections
import contextlib
import logging
import math
import os
import sys
from collections.abc import Iterator

import jax

from loro_jax.errors import TrainingError
from loro_jax.planning.accelerators import ACCELERATORS
from loro_jax.planning.kernels import PARTS
from loro_jax.planning.plan import Plan, make_plan
from loro_jax.planning.topologies import NAMES, TPUS
from loro_jax.tables import print_table
from loro_jax.text.tokenizers.tokenizer import load_tokenizer
from loro_jax.training.config import Config, MeshConfig
from loro_jax.training.start import with_architecture
from loro_jax.training.stored_adapter import with_stored_adapter
from loro_jax.training.tasks import check_language
from loro_jax.training.vocabulary import resolve_vocabulary


def dry_run(config: Config, devices: int | None, accelerator: str | None = None) -> None:
    """Compiles a run's step for devices that are not here and prints the estimates.

    Args:
        config: the run's config.
        devices: number of devices; None: from ``config.mesh``.
        accelerator: accelerator to compile for, one of
            :data:`loro_jax.planning.topologies.NAMES`; None: simulated devices.

    Raises:
        TrainingError: for an invalid config, an unknown number of devices, or an accelerator whose
            compiler is not installed.
    """
    check_language(config, "--dry_run: the config")
    config = with_stored_adapter(with_architecture(config))
    config.validate()
    if config.model.vocab_size == 0:
        data = config.data
        tokenizer = load_tokenizer(data.tokenizer, data.eos_id, data.pad_id)
        config, _ = resolve_vocabulary(config, tokenizer)
    count = devices or _devices_of(config.mesh)
    if accelerator is None:
        simulate_devices(count)
    else:
        jax.config.update("jax_platforms", "cpu")
    # XLA ends the process for an option in XLA_FLAGS that it does not know; here its message is
    # still seen.
    jax.devices()
    with quiet_partitioner(accelerator):
        plan = make_plan(config, count, accelerator)
    for line in describe(config, plan):
        print(line)
    print_table(step_times(plan))
    if plan.accelerator is None:
        print(
            "Compiled for CPU, so that bytes are upper bounds and times count products alone. "
            f"Compile for an accelerator that is not here by --accelerator={'|'.join(NAMES)} "
            "(needs jax[cuda13] for a GPU, jax[tpu] for a TPU)."
        )
    else:
        print_table(times_of_parts(plan))


def simulate_devices(count: int) -> None:
    """Makes JAX simulate several CPU devices; call it before JAX is initialised."""
    if count > 1:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", count)


def _devices_of(mesh: MeshConfig) -> int:
    sizes = (mesh.data, mesh.fsdp, mesh.tensor)
    if min(sizes) < 1:
        raise TrainingError(
            f"config.mesh = {mesh.data} x {mesh.fsdp} x {mesh.tensor} (data x fsdp x tensor) "
            "does not determine the number of devices; expected --devices=N."
        )
    return math.prod(sizes)


@contextlib.contextmanager
def quiet_partitioner(accelerator: str | None = None) -> Iterator[None]:
    """Returns a context that suppresses the messages of XLA's partitioner on standard error.

    Args:
        accelerator: what is compiled for. For a TPU nothing is suppressed: its compiler says
            nothing, but ends the process for an option in XLA_FLAGS that it does not know.
    """
    if accelerator in TPUS:
        yield
        return
    logging.captureWarnings(True)
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w", encoding="utf-8") as nothing:
        os.dup2(nothing.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            logging.captureWarnings(False)


def describe(config: Config, plan: Plan) -> list[str]:
    """Describes a plan, except for its times."""
    per_device = plan.model_flops / plan.devices
    executed = sum(one.flops for one in plan.kernels)
    kinds: collections.Counter[str] = collections.Counter()
    for exchange in plan.exchanges:
        kinds[exchange.kind] += round(exchange.sent)
    by_kind = ", ".join(f"{kind} {_bytes(sent)}" for kind, sent in kinds.most_common())
    lines = [
        f"{config.method}, {plan.parameters / 1e9:.3g}G parameters, on {plan.devices} device(s) "
        f"({config.mesh.data} x {config.mesh.fsdp} x {config.mesh.tensor}, data x fsdp x tensor); "
        f"{plan.tokens:,} tokens per step",
        f"  each device holds {_bytes(plan.state_bytes)} of parameters and optimizer state, and "
        f"at most {_bytes(plan.temporary_bytes)} more within a step (compiled for "
        f"{plan.accelerator or 'CPU'} in {plan.compile_seconds:.0f} s)",
        f"  it computes {per_device / 1e12:.3g} TFLOP per step for the model, "
        f"{executed / 1e12:.3g} with recomputed and replicated products",
        f"  it sends {_bytes(plan.sent)} per step" + (f" ({by_kind})" if by_kind else ""),
    ]
    if config.exact_every and plan.exact_exchanges != plan.exchanges:
        lines.append(f"  and {_bytes(plan.sent_more)} more in an exact one")
    return lines


def step_times(plan: Plan) -> list[dict[str, object]]:
    """Returns bounds on the times of a step, as rows of a table.

    Args:
        plan: the plan.

    Returns:
        One row for the accelerator that the step is compiled for, or else one for each.
    """
    rows: list[dict[str, object]] = []
    for name in [plan.accelerator] if plan.accelerator else ACCELERATORS:
        accelerator = ACCELERATORS[name]
        computing, exchanging = plan.seconds(accelerator)
        least, most = max(computing, exchanging), computing + exchanging
        peak = plan.devices * accelerator.flops
        held = plan.state_bytes + plan.temporary_bytes
        rows.append(
            {
                "accelerator": name,
                "fits": "yes" if held < accelerator.memory else "no",
                "computing ms": 1e3 * computing,
                "exchanges ms": 1e3 * exchanging,
                "step ms": f"{1e3 * least:.3g} to {1e3 * most:.3g}",
                "tokens/s": f"{plan.tokens / most:.3g} to {plan.tokens / least:.3g}",
                "MFU": f"{plan.model_flops / peak / most:.2f} to "
                f"{plan.model_flops / peak / least:.2f}",
            }
        )
    return rows


def times_of_parts(plan: Plan) -> list[dict[str, object]]:
    """Returns what each part of an approximate step computes and moves, as rows of a table.

    Args:
        plan: a plan for a named accelerator.

    Returns:
        One row per part, and one of sums; milliseconds are lower bounds, kernel by kernel.
    """
    accelerator = ACCELERATORS[plan.accelerator or ""]
    rows: list[dict[str, object]] = []
    for part in (*PARTS, "all"):
        kernels = [kernel for kernel in plan.kernels if part in (kernel.part, "all")]
        rows.append(
            {
                "part": part,
                "kernels": sum(kernel.calls for kernel in kernels),
                "TFLOP": sum(kernel.flops for kernel in kernels) / 1e12,
                "GB moved": sum(kernel.bytes for kernel in kernels) / 1e9,
                "products alone ms": 1e3
                * sum(kernel._replace(bytes=0).seconds(accelerator) for kernel in kernels),
                "at least ms": 1e3 * sum(kernel.seconds(accelerator) for kernel in kernels),
            }
        )
    return rows


def _bytes(count: float) -> str:
    return f"{count / 1e9:.3g} GB" if count >= 1e8 else f"{count / 1e6:.3g} MB"
