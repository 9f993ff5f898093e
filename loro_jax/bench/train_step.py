"""Speed and memory of whole training steps, by method, compared with the machine's peak.

One round times a step of every method, the gradient of every method alone (the rest of a step is
its optimizer), and a large matrix product in the same dtype, whose rate is taken as the machine's
peak. Steps are approximate ones; ``loro exact`` is the same step with an exact one in it.

MFU is the model's FLOPs (matrix products, no recomputation) per time, as a fraction of that peak;
``MFU datasheet`` uses the manufacturer's bfloat16 peak instead, if the device is known.
``speed-up`` is relative to the first method, next to the ratio of the FLOPs. ``held MB`` is the
memory of the compiled step: state, batch, results, temporaries.

``--counterpart=torch`` compares the steps with PyTorch's instead, in turns: transformers' LLaMA,
with factorised projections if the method is low-rank, and fused AdamW, from the same weights and
tokens (``loss`` is that of the first step, of both). ``ratio`` is our speed over PyTorch's.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from loro_jax.bench.options import add_step_options, make_parser, model_changes, parse_options
from loro_jax.bench.timing import time_in_turns
from loro_jax.errors import TrainingError
from loro_jax.planning.accelerators import accelerator_of
from loro_jax.planning.flops import flops_per_token
from loro_jax.tables import report
from loro_jax.training import mesh as meshes
from loro_jax.training.config import METHODS, Config
from loro_jax.training.fields import apply_changes
from loro_jax.training.step import compile_program, make_program
from loro_jax.training.threads import lapack_by_one_thread
from models.llama import PRESETS, LlamaConfig, preset
from models.loss import Batch

# Side of the square matrices whose products measure the peak, and the number of products per call:
# on an accelerator a single one takes less time than dispatching the next call.
_PEAK_SIZE = {"cpu": (2048, 1), "gpu": (8192, 16), "tpu": (8192, 16)}

# LORO's step with an exact step every time.
_EXACT = "loro exact"

# Methods whose step PyTorch takes too, by AdamW on the same parameters, and what is compared.
_HAVE_COUNTERPARTS = ("full", "lowrank", "loro")
_WITH_COUNTERPART = {"methods": "full,lowrank", "batch_size": 16, "gradient_accumulation": 2}


class Case(NamedTuple):
    """A method's compiled step, ready to be timed."""

    config: Config
    step: Callable[[], Any]
    gradient: Callable[[], Any]
    hlo: Callable[[], str]
    compile_seconds: float
    state_bytes: int
    temporary_bytes: int
    held_bytes: int


def main(arguments: Sequence[str]) -> None:
    """Runs the benchmark; see ``--help``."""
    options = options_of_steps("train_step", __doc__, arguments, counterpart=True)
    measure = _measure
    if options.counterpart:
        # Imported here: those modules use this one.
        from loro_jax.bench.counterpart import process, training

        if process.skipped(f"--counterpart={options.counterpart}"):
            return
        measure = training.training_rows
    rows: list[dict[str, Any]] = []
    for model in options.models:
        rows += measure(model, options)
        report(rows, options)  # after each model, in case a later one is interrupted


def options_of_steps(
    name: str, doc: str | None, arguments: Sequence[str], counterpart: bool = False
) -> argparse.Namespace:
    """Parses the options of benchmarks of methods' steps; exits with a message if invalid.

    Args:
        name: name of the benchmark.
        doc: its description.
        arguments: command line arguments.
        counterpart: whether the benchmark has the option ``--counterpart``.

    Returns:
        The options, with ``models`` and ``methods`` as lists.
    """
    parser = make_parser(name, doc, "60m", rounds=5)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--gradient_accumulation", type=int, default=1)
    parser.add_argument("--rank", type=int, help="default: the model's")
    add_step_options(
        parser, methods=f"full,lowrank,loro,{_EXACT}", dtype="float32", param_dtype=None
    )
    known = (*METHODS, _EXACT)
    if counterpart:
        parser.add_argument(
            "--counterpart",
            choices=["torch"],
            help="compare with PyTorch's steps; the defaults are then those of "
            + ", ".join(f"--{name}={value}" for name, value in _WITH_COUNTERPART.items()),
        )
        if parser.parse_known_args(arguments)[0].counterpart:
            parser.set_defaults(**_WITH_COUNTERPART)
            known = _HAVE_COUNTERPARTS
    options = parse_options(parser, arguments, PRESETS)
    options.methods = options.methods.split(",")
    for method in options.methods:
        if method not in known:
            parser.error(f"--methods: unknown method {method!r}; expected {', '.join(known)}")
    return options


@lapack_by_one_thread()  # as train.py does
def _measure(model: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    cases = {name: prepare(config_of_step(model, name, options)) for name in options.methods}
    candidates = {f"step {name}": case.step for name, case in cases.items()}
    candidates |= {f"gradient {name}": case.gradient for name, case in cases.items()}
    size, count = _PEAK_SIZE.get(jax.default_backend(), (4096, 1))
    candidates["peak"] = _products(size, count, options.dtype)
    seconds = time_in_turns(candidates, options.rounds)
    peak = 2 * count * size**3 / seconds["peak"]
    known = accelerator_of(jax.devices()[0].device_kind)
    datasheet = known.flops if known else float("nan")
    tokens = options.batch_size * options.sequence_length
    first = options.methods[0]
    rows = []
    for name, case in cases.items():
        step, flops = seconds[f"step {name}"], flops_per_token(case.config)
        speed_up = seconds[f"step {first}"] / step
        flop_ratio = flops_per_token(cases[first].config) / flops
        rows.append(
            {
                "model": model,
                "method": name,
                "tokens/s": tokens / step,
                "MFLOPs/token": flops / 1e6,
                "MFU": flops * tokens / step / peak,
                "MFU datasheet": flops * tokens / step / datasheet,
                "speed-up": speed_up,
                "FLOP ratio": flop_ratio,
                "speed-up / FLOP ratio": speed_up / flop_ratio,
                "optimizer share": 1 - seconds[f"gradient {name}"] / step,
                "state MB": case.state_bytes / 1e6,
                "temporaries MB": case.temporary_bytes / 1e6,
                "held MB": case.held_bytes / 1e6,
                "device peak MB": _device_peak() / 1e6,
                "compile s": case.compile_seconds,
                "peak GFLOPS": peak / 1e9,
                "datasheet GFLOPS": datasheet / 1e9,
            }
        )
    return rows


def config_of_step(model: str, method: str, options: argparse.Namespace) -> Config:
    """Returns the config of a method's run; "loro exact" takes exact steps only.

    Raises:
        TrainingError: for an unknown field or invalid value in ``--set``.
    """
    changes = model_changes(options) | {"remat": _remat_of(method, options.remat)}
    if options.rank is not None:
        changes["rank"] = options.rank
    return step_config(
        preset(model, **changes),
        "loro" if method == _EXACT else method,
        options,
        exact_every=1 if method == _EXACT else 10_000,
        batch_size=options.batch_size,
        gradient_accumulation=options.gradient_accumulation,
    )


def step_config(
    model: LlamaConfig, method: str, options: argparse.Namespace, **changes: Any
) -> Config:
    """Returns the config of a benchmark's step.

    Args:
        model: the model.
        method: a name from :data:`loro_jax.training.config.METHODS`.
        options: options with ``sequence_length``, and ``set`` for further fields.
        changes: fields of the run.

    Returns:
        The validated config.

    Raises:
        TrainingError: for an unknown method, or an unknown field or invalid value in ``--set``.
    """
    if method not in METHODS:
        raise TrainingError(f"--methods: unknown {method!r}; expected {', '.join(METHODS)}.")
    config = Config(method=method, sequence_length=options.sequence_length, model=model, **changes)
    apply_changes(config, options.set)
    config.validate()
    return config


def _remat_of(method: str, given: str) -> str:
    """Returns ``--remat`` of one method: one name for all, or ``METHOD=NAME,...``."""
    if "=" not in given:
        return given
    chosen = dict(part.split("=", 1) for part in given.split(",") if "=" in part)
    if method.split()[0] not in chosen:
        raise TrainingError(f"--remat={given} has no entry for {method!r}; expected METHOD=NAME.")
    return chosen[method.split()[0]]


def prepare(config: Config, *, donate: bool = True) -> Case:
    """Compiles the step of a config, for a batch of random ids.

    Args:
        config: config of the run.
        donate: whether to donate the state's buffers to the step.

    Returns:
        The step, ready to be timed, and its memory.
    """
    devices = meshes.make_mesh(config.mesh)
    program, abstract = compile_program(make_program(config, devices), devices)
    batch = jax.device_put(random_batch(config), meshes.batch_sharding(devices))
    started = time.perf_counter()
    train_step: Any = program.train_step
    if not donate:
        train_step = jax.jit(train_step.__wrapped__)
    compiled = train_step.lower(abstract, batch).compile()
    compile_seconds = time.perf_counter() - started
    memory = compiled.memory_analysis()
    held = [program.init()]

    def step() -> Any:
        held[0], metrics = compiled(held[0], batch)
        return metrics

    return Case(
        config=config,
        step=step,
        hlo=compiled.as_text,
        gradient=lambda: program.loss_and_gradient(held[0].params, held[0].fixed, batch),
        compile_seconds=compile_seconds,
        state_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        held_bytes=memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes,
    )


def random_batch(config: Config) -> Batch:
    """Returns the batch of random ids that steps of a config are timed with."""
    rng = np.random.default_rng(0)
    shape = (config.batch_size, config.sequence_length)
    tokens = rng.integers(0, config.model.vocab_size, shape, np.int32)
    return Batch(tokens, np.roll(tokens, -1, axis=1), np.ones(shape, np.float32))


def _products(size: int, count: int, dtype: str) -> Callable[[], Any]:
    # Random entries: with equal entries products take less power, and a GPU's clock is higher. The
    # scale of y keeps the variance of repeated products constant.
    x, y = jax.random.normal(jax.random.key(0), (2, size, size), dtype)
    y = y * jnp.asarray(size**-0.5, dtype)
    multiply = jax.jit(lambda x, y: jax.lax.fori_loop(0, count, lambda _, x: x @ y, x))
    return lambda: multiply(x, y)


def _device_peak() -> float:
    """Returns the device's peak bytes in use so far in this process; NaN if unknown."""
    statistics = jax.devices()[0].memory_stats() or {}
    return float(statistics.get("peak_bytes_in_use", float("nan")))
