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
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from loro_jax.bench.counterpart import process, training
from loro_jax.bench.options import add_step_options, make_parser, parse_options
from loro_jax.bench.steps import EXACT, config_of_step
from loro_jax.planning.accelerators import accelerator_of
from loro_jax.planning.flops import flops_per_token
from loro_jax.planning.measured_step import prepare
from loro_jax.planning.timing import time_in_turns
from loro_jax.tables import report
from loro_jax.training.config import METHODS
from loro_jax.training.threads import lapack_by_one_thread
from models.llama import PRESETS

# Side of the square matrices whose products measure the peak, and the number of products per call:
# on an accelerator a single one takes less time than dispatching the next call.
_PEAK_SIZE = {"cpu": (2048, 1), "gpu": (8192, 16), "tpu": (8192, 16)}

# Methods whose step PyTorch takes too, by AdamW on the same parameters, and what is compared.
_HAVE_COUNTERPARTS = ("full", "lowrank", "loro")
_WITH_COUNTERPART = {"methods": "full,lowrank", "batch_size": 16, "gradient_accumulation": 2}


def main(arguments: Sequence[str]) -> None:
    """Runs the benchmark; see ``--help``."""
    options = options_of_steps("train_step", __doc__, arguments, counterpart=True)
    measure = _measure
    if options.counterpart:
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
        parser, methods=f"full,lowrank,loro,{EXACT}", dtype="float32", param_dtype=None
    )
    known = (*METHODS, EXACT)
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
