"""Packed and separate products of projections that share an input.

Times the output and all gradients of q, k and v, and of gate and up, of one layer, which
:func:`loro_jax.layers.packing.apply_together` computes together. ``each / together`` above one is
its speed-up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from loro_jax.bench.options import make_parser, parse_options
from loro_jax.layers.packing import apply_together
from loro_jax.layers.projections import make_projection
from loro_jax.planning.timing import time_in_turns
from loro_jax.tables import report
from models.llama import PRESETS, LlamaConfig, preset

# Group and names of the projections that share an input.
_SHARED = (("attn", ("q", "k", "v")), ("mlp", ("gate", "up")))


def main(arguments: Sequence[str]) -> None:
    """Runs the benchmark; see ``--help``."""
    parser = make_parser("together", __doc__, "60m", rounds=9)
    parser.add_argument("--tokens", type=int, default=2048, help="rows of the input")
    options = parse_options(parser, arguments, PRESETS)
    rows = []
    for name in options.models:
        for group, projections in _SHARED:
            candidates = _candidates(preset(name), group, projections, options.tokens)
            seconds = time_in_turns(candidates, options.rounds)
            rows.append(
                {
                    "model": name,
                    "projections": ", ".join(projections),
                    "tokens": options.tokens,
                    "each ms": 1e3 * seconds["each"],
                    "together ms": 1e3 * seconds["together"],
                    "each / together": seconds["each"] / seconds["together"],
                }
            )
    report(rows, options)


def _candidates(
    config: LlamaConfig, group: str, names: Sequence[str], tokens: int
) -> dict[str, Callable[[], Any]]:
    spec, shapes = config.projection_spec(group), config.shapes(group)
    made = [
        make_projection(shapes[name][1], shapes[name][0], spec, nnx.Rngs(i))
        for i, name in enumerate(names)
    ]
    graphdef, state = nnx.split(made)
    x = jax.random.normal(jax.random.key(0), (tokens, config.hidden_size))

    def candidate(apply: Callable[..., list[jax.Array]]) -> Callable[[], Any]:
        def total(state: Any, x: jax.Array) -> jax.Array:
            outputs = apply(nnx.merge(graphdef, state), x)
            return sum((jnp.sum(y * y) for y in outputs), jnp.zeros([]))

        # The gradient of x is included: it is the sum over the projections that packing avoids.
        gradient = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))
        return lambda: gradient(state, x)

    return {
        "each": candidate(lambda projections, x: [p(x) for p in projections]),
        "together": candidate(apply_together),
    }
