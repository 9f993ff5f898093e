"""Speed of forward passes over whole batches: dense and low-rank in turns, logits and scores.

``logits`` are those of every token of a batch, as in serving; ``score`` is the sum of the tokens'
log-likelihoods, in chunks (:func:`models.loss.cross_entropy`), as in evaluation. Ratios are the
dense model's over the low-rank one's; ``FLOP ratio`` is that of matrix products, including
attention. ``memory`` is that of the compiled program: weights, tokens, results and temporaries.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from loro_jax.bench.options import make_parser, parse_options, whole_numbers
from loro_jax.planning.flops import flops_per_token
from loro_jax.planning.timing import time_in_turns
from loro_jax.tables import report
from loro_jax.training.config import Config
from models.llama import PRESETS, Llama, LlamaConfig, preset
from models.loss import cross_entropy

WHAT = ("logits", "score")


class _Case(NamedTuple):
    """A compiled program with one model's weights."""

    run: Callable[[], Any]
    memory_bytes: int


def main(arguments: Sequence[str]) -> None:
    """Runs the benchmark; see ``--help``."""
    parser = make_parser("forward", __doc__, "60m", rounds=5)
    parser.add_argument("--batch_sizes", default="1,8,32", help="default 1,8,32")
    parser.add_argument("--lengths", default="256", help="sequence lengths, default 256")
    parser.add_argument("--rank", type=int, help="default: the model's")
    parser.add_argument("--dtype", default="float32", help="dtype of weights and products")
    options = parse_options(parser, arguments, PRESETS)
    batch_sizes, lengths = whole_numbers(parser, options, "batch_sizes", "lengths")
    rows = []
    for name in options.models:
        config = preset(name, dtype=options.dtype, param_dtype=options.dtype)
        config.max_sequence_length = max(config.max_sequence_length, *lengths)
        if options.rank:
            config.rank = options.rank
        try:
            config.validate()
        except ValueError as error:
            parser.error(str(error))
        models = {kind: Llama(made, nnx.Rngs(0)) for kind, made in _kinds(config).items()}
        for length in lengths:
            for batch_size in batch_sizes:
                rows += _measure(name, models, batch_size, length, options.rounds)
    report(rows, options)


def _kinds(config: LlamaConfig) -> dict[str, LlamaConfig]:
    return {"full": config.dense(), "low_rank": config}


def _measure(
    name: str, models: dict[str, Llama], batch_size: int, length: int, rounds: int
) -> list[dict[str, Any]]:
    flops = {
        kind: flops_per_token(
            Config(sequence_length=length, model=dataclasses.replace(model.config))
        )
        for kind, model in models.items()
    }
    rows = []
    for what in WHAT:
        cases = {kind: _prepare(model, what, batch_size, length) for kind, model in models.items()}
        seconds = time_in_turns({kind: case.run for kind, case in cases.items()}, rounds)
        rows += [
            {
                "model": name,
                "projections": kind,
                "what": what,
                "batch": batch_size,
                "length": length,
                "tokens/s": batch_size * length / seconds[kind],
                "speed-up": seconds["full"] / seconds[kind],
                "FLOP ratio": flops["full"] / flops[kind],
                "memory MB": case.memory_bytes / 1e6,
            }
            for kind, case in cases.items()
        ]
    return rows


def _prepare(model: Llama, what: str, batch_size: int, length: int) -> _Case:
    graphdef, state = nnx.split(model)
    rng = np.random.default_rng(0)
    ids = rng.integers(model.config.vocab_size, size=(batch_size, length + 1))
    inputs, targets = (jnp.asarray(part, jnp.int32) for part in (ids[:, :-1], ids[:, 1:]))

    def read(state: Any, inputs: jax.Array, targets: jax.Array) -> jax.Array:
        model = nnx.merge(graphdef, state)
        if what == "logits":
            return model(inputs)
        mask = jnp.ones(targets.shape, jnp.float32)
        states, chunk = model.hidden_states(inputs), model.config.loss_chunk_size
        return -cross_entropy(states, model.head_VxD(), targets, mask, chunk)

    compiled = jax.jit(read).lower(state, inputs, targets).compile()
    held = compiled.memory_analysis()
    # Missing figures count as 0.
    parts = ("argument_size_in_bytes", "output_size_in_bytes", "temp_size_in_bytes")
    memory = sum(getattr(held, part, 0) for part in parts)
    return _Case(run=lambda: compiled(state, inputs, targets), memory_bytes=memory)
