"""Cost per token for models, ranks, sequence lengths and K: counted, and measured for one model.

Matrix products are counted as in :mod:`loro_jax.planning.flops`, parameters, weights and state as
in :mod:`loro_jax.memory`. An exact step is counted by its leading products: per pair ten of a
factor with an r x r matrix and thirty of r x r matrices, each with two operations per
multiplication; its cost is divided by the tokens of K steps.

``--measure=60m`` also trains that model with every rank (by approximate steps), and dense, in
turns; ``--plot`` plots its tokens per second against the rank, with the prediction from FLOPs.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from loro_jax.bench.options import make_parser, parse_options, whole_numbers
from loro_jax.planning.flops import flops_per_token
from loro_jax.planning.measured_step import prepare
from loro_jax.planning.memory_table import held_by
from loro_jax.planning.timing import time_in_turns
from loro_jax.tables import replacing, report
from loro_jax.training.config import Config
from models.llama import PRESETS, LlamaConfig, preset

# Products in one pair's exact step: of a factor with an r x r matrix, and of r x r matrices.
_TALL_PRODUCTS, _SMALL_PRODUCTS = 10, 30


def exact_step_flops(model: LlamaConfig) -> float:
    """Counts the operations of an exact step of all pairs of a model.

    Example:
        >>> model = LlamaConfig(hidden_size=8, intermediate_size=8, num_layers=1, rank=2)
        >>> exact_step_flops(model) == 7 * (10 * 2 * 2 * 2 * 8 + 30 * 2 * 2**3)
        True
    """
    total = 0.0
    for group in ("attn", "mlp"):
        rank = model.group_rank(group)
        if rank is None:
            continue
        for m, n in model.shapes(group).values():
            tall = _TALL_PRODUCTS * 2 * rank**2 * (m + n) / 2
            total += tall + _SMALL_PRODUCTS * 2 * rank**3
    return model.num_layers * total


def main(arguments: Sequence[str]) -> None:
    """Runs the benchmark; see ``--help``."""
    parser = make_parser("cost", __doc__, "60m,130m,350m,1b,7b", rounds=3)
    parser.add_argument("--ranks", default="16,8,4,2", help="divisors of the hidden size")
    parser.add_argument("--sequence_lengths", default="256,1024")
    parser.add_argument("--exact_every", default="50,200,500", help="values of K")
    parser.add_argument("--tokens", type=int, default=131_072, help="tokens per step")
    parser.add_argument("--measure", choices=PRESETS, help="also measure this model's steps")
    parser.add_argument("--measure_batch", type=int, default=8, help="sequences of these steps")
    parser.add_argument("--plot", type=pathlib.Path, help="file for a plot of the measurements")
    options = parse_options(parser, arguments, PRESETS)
    divisors, lengths, periods = whole_numbers(
        parser, options, "ranks", "sequence_lengths", "exact_every"
    )
    if options.plot and not options.measure:
        parser.error("--plot: needs --measure=MODEL")
    rows = [
        _counted(name, divisor, length, periods, options.tokens)
        for name in options.models
        for divisor in divisors
        for length in lengths
    ]
    if options.measure:
        measured = _measured(options.measure, divisors, lengths[0], options)
        if options.plot:
            _plot(options.measure, measured, options.plot)
        options.more = {"measured": measured}
    report(rows, options)


def _config(name: str, divisor: int | None, length: int) -> Config:
    model = preset(name)
    model = dataclasses.replace(model, max_sequence_length=max(length, model.max_sequence_length))
    if divisor is None:
        return Config(method="full", sequence_length=length, model=model)
    rank = max(model.hidden_size // divisor, 1)
    config = Config(sequence_length=length, model=dataclasses.replace(model, rank=rank))
    config.validate()
    return config


def _counted(
    name: str, divisor: int, length: int, periods: Sequence[int], tokens: int
) -> dict[str, Any]:
    config, dense = _config(name, divisor, length), _config(name, None, length)
    flops, of_dense = flops_per_token(config), flops_per_token(dense)
    held, dense_held = held_by(config), held_by(dense)
    exact = exact_step_flops(config.model)
    return {
        "model": name,
        "rank": config.model.rank,
        "sequence": length,
        "parameters M": held.total / 1e6,
        "of dense": held.total / dense_held.total,
        "MFLOPs/token": flops / 1e6,
        "dense / it": of_dense / flops,
        **{f"exact, K={K}": exact / K / tokens / flops for K in periods},
        "state GB": (held.weights + held.optimizer) / 1e9,
    }


def _measured(
    name: str, divisors: Sequence[int], length: int, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Measures the tokens per second of whole steps, dense and with every rank, in turns."""
    configs = {"dense": _config(name, None, length)}
    for divisor in divisors:
        # What exact steps cost is counted, not measured here.
        config = dataclasses.replace(_config(name, divisor, length), exact_every=0)
        configs[str(config.model.rank)] = config
    cases = {
        rank: prepare(dataclasses.replace(config, batch_size=options.measure_batch))
        for rank, config in configs.items()
    }
    seconds = time_in_turns({rank: case.step for rank, case in cases.items()}, options.rounds)
    tokens = options.measure_batch * length
    of_dense = flops_per_token(configs["dense"])
    return [
        {
            "rank": rank,
            "tokens/s": tokens / seconds[rank],
            "speed-up": seconds["dense"] / seconds[rank],
            "FLOP ratio": of_dense / flops_per_token(configs[rank]),
        }
        for rank in configs
    ]


def _plot(name: str, measured: list[dict[str, Any]], path: pathlib.Path) -> None:
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    dense, *low_rank = measured
    ranks = [int(row["rank"]) for row in low_rank]
    axes.plot(ranks, [row["tokens/s"] for row in low_rank], "o-", label="measured")
    promised = [dense["tokens/s"] * row["FLOP ratio"] for row in low_rank]
    axes.plot(ranks, promised, "--", label="dense times the FLOP ratio")
    axes.axhline(dense["tokens/s"], color="grey", label="dense")
    axes.set(xlabel="rank", ylabel="tokens per second", title=f"Training {name}", xscale="log")
    axes.set_xticks(ranks, [str(rank) for rank in ranks], minor=False)
    axes.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:] or "png", dpi=120)
