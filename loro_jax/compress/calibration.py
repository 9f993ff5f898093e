"""Moments of the inputs of all projections, layer by layer.

The hidden states that enter one layer are in memory, and the moments of one layer; activations
exist only for one batch.

Shapes: as in :mod:`models.llama`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from loro_jax.compress.moments import Moments
from models.crossing import nothing_below
from models.llama import Llama

Array = jax.Array

# Projections by the input that they share: output of a norm, or input of the projection itself.
_READERS = {
    "attention_norm": ("q", "k", "v"),
    "o": ("o",),
    "mlp_norm": ("gate", "up"),
    "down": ("down",),
}


def input_moments(
    model: Llama, tokens_NxL: np.ndarray, batch_size: int = 4
) -> Iterator[dict[str, Moments]]:
    """Yields the moments of each layer's projections, from the first layer to the last.

    Args:
        model: the model, whose projections are dense.
        tokens_NxL: sequences of token ids.
        batch_size: sequences per batch.

    Yields:
        Moments by the projections' names.

    Example:
        >>> from models import LlamaConfig
        >>> config = LlamaConfig(64, 32, 48, num_layers=2, num_heads=4, scope="none")
        >>> found = list(input_moments(Llama(config, nnx.Rngs(0)), np.arange(24).reshape(2, 12)))
        >>> len(found), sorted(found[0]), found[0]["down"].second.shape
        (2, ['down', 'gate', 'k', 'o', 'q', 'up', 'v'], (48, 48))
    """
    dtype = jnp.dtype(model.config.dtype)
    batches = [
        model.embedding[...][tokens_NxL[start : start + batch_size]].astype(dtype)
        for start in range(0, len(tokens_NxL), batch_size)
    ]
    graphdef, stacked = nnx.split(model.blocks)
    step = jax.jit(functools.partial(_layer, graphdef, model.config))
    for layer in range(model.config.num_layers):
        params = jax.tree.map(lambda x, layer=layer: x[layer], stacked)
        sums: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for number, x_BxLxD in enumerate(batches):
            batches[number], found = step(params, x_BxLxD)
            for name, arrays in found.items():
                # Products of one batch are in float32, their sums in float64.
                new = [np.asarray(array, np.float64) for array in arrays]
                old = sums.get(name, (0.0, 0.0))
                sums[name] = (old[0] + new[0], old[1] + new[1])
        count = tokens_NxL.size
        yield {
            reader: Moments(second / count, size / count)
            for name, (second, size) in sums.items()
            for reader in _READERS[name]
        }


def _layer(graphdef: Any, config: Any, params: Any, x_BxLxD: Array) -> tuple[Array, Any]:
    """Applies a block; returns its output and the sums over its projections' inputs."""
    block = nnx.merge(graphdef, params)
    seen: dict[str, Array] = {}
    block.attention_norm = _Seen(block.attention_norm, lambda x, y: seen.update(attention_norm=y))
    block.mlp_norm = _Seen(block.mlp_norm, lambda x, y: seen.update(mlp_norm=y))
    block.attention.o = _Seen(block.attention.o, lambda x, y: seen.update(o=x))
    block.mlp.down = _Seen(block.mlp.down, lambda x, y: seen.update(down=x))
    y_BxLxD, _ = block(x_BxLxD, nothing_below(config, x_BxLxD))
    return y_BxLxD, {name: _sums(inputs) for name, inputs in seen.items()}


class _Seen(nnx.Module):
    """A module whose inputs and outputs are reported when it is called."""

    def __init__(self, module: Any, report: Callable[[Array, Array], None]):
        self.module = module
        self.report = report

    def __call__(self, x: Array) -> Array:
        y = self.module(x)
        self.report(x, y)
        return y


def _sums(inputs: Array) -> tuple[Array, Array]:
    """Returns the sums of x x^T and of |x| over the tokens of a batch, float32."""
    x_NxC = inputs.reshape(-1, inputs.shape[-1]).astype(jnp.float32)
    second = jnp.matmul(x_NxC.T, x_NxC, precision=jax.lax.Precision.HIGHEST)
    return second, jnp.sum(jnp.abs(x_NxC), axis=0)
