"""Time and memory of LORO's approximate step, compared with ``optax.adamw`` on the same leaves.

Both compute and apply updates in one compiled call with donated buffers, as a training step does.
The leaves are those of the paper's LLaMA models: stacked factors, embedding and head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from loro_jax.bench.exact_step import MODELS, layer_shapes
from loro_jax.bench.options import make_parser, parse_options
from loro_jax.loro import loro
from loro_jax.planning.timing import time_in_turns
from loro_jax.tables import report
from models.llama import preset


def make_leaves(model: str) -> Any:
    """Creates parameters with the shapes of a whole model: stacked pairs, embedding and head."""
    keys = iter(jax.random.split(jax.random.key(0), 20))
    config = preset(model)

    def normal(*shape: int) -> jax.Array:
        return 0.02 * jax.random.normal(next(keys), shape)

    layers = config.num_layers
    pairs = [
        {"B": normal(layers, m, r), "A": normal(layers, r, n)} for m, n, r in layer_shapes(model)
    ]
    return {
        "pairs": pairs,
        "embedding": normal(config.vocab_size, config.hidden_size),
        "head": normal(config.vocab_size, config.hidden_size),
    }


def candidate(tx: optax.GradientTransformation, model: str) -> tuple[Callable[[], Any], int]:
    """Returns a function that takes a step in place, and the bytes of its temporaries."""
    params = make_leaves(model)
    state = tx.init(params)
    grads = jax.tree.map(lambda x: x + 0.01, params)

    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        # Applied in the same program, as in training: XLA fuses the two.
        return optax.apply_updates(params, updates), state

    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, grads).compile()
    # Donated buffers: each call consumes the arrays that the previous one returned.
    held = [params, state]

    def run() -> Any:
        held[:] = compiled(*held, grads)
        return held

    memory: Any = compiled.memory_analysis()
    return run, int(memory.temp_size_in_bytes)


def _rate(step: jax.typing.ArrayLike) -> jax.Array:
    return jnp.float32(1e-3)


def main(arguments: Sequence[str]) -> None:
    """Runs the benchmark; see ``--help``."""
    parser = make_parser("approximate_step", __doc__, "60m", rounds=15)
    options = parse_options(parser, arguments, MODELS)
    rows = []
    for model in options.models:
        candidates = {
            "adamw": candidate(optax.adamw(_rate, weight_decay=0.01), model),
            # Both branches are compiled, but no exact step is ever due.
            "loro": candidate(loro(_rate, exact_every=10**9, weight_decay=0.01), model),
            "loro, never exact": candidate(loro(_rate, exact_every=None, weight_decay=0.01), model),
        }
        seconds = time_in_turns(
            {name: run for name, (run, _) in candidates.items()}, options.rounds
        )
        for name, (_, temporary) in candidates.items():
            rows.append(
                {
                    "model": model,
                    "optimizer": name,
                    "ms": 1e3 * seconds[name],
                    "time / adamw": seconds[name] / seconds["adamw"],
                    "temporaries MB": temporary / 1e6,
                }
            )
    report(rows, options)
