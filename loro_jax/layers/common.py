"""What all kinds of projection share: how one is specified, and what a model holds untrained."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

Array = jax.Array

# What a backward pass may be told to keep: ``x A^T``.
LATENT = "latent"


@dataclasses.dataclass(frozen=True)
class ProjectionSpec:
    """What a projection is made of.

    Attributes:
        kind: of the projections that have a rank, a key of
            :data:`loro_jax.layers.projections.PROJECTIONS`.
        rank: inner dimension of a low-rank projection; None: dense.
        initialiser: how factors are drawn, a name known to :func:`loro_jax.initialise`.
        initializer_range: standard deviation of a dense weight's entries.
        alpha: the product of factors is scaled by ``alpha / rank`` (lora, sltrain).
        density: share of a sparse matrix's entries that are not zero (sltrain).
        dtype: dtype of the products.
        param_dtype: dtype of the stored weights.
    """

    kind: str = "low_rank"
    rank: int | None = None
    initialiser: str = "xavier"
    initializer_range: float = 0.02
    alpha: float = 32.0
    density: float = 0.03
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32


class Fixed(nnx.Variable):
    """A part of a model that is not trained: no gradient is taken of it."""


def named(latent: Array) -> Array:
    """Marks ``x A^T`` by the name that rematerialisation policies know it by."""
    return checkpoint_name(latent, LATENT)


def by_rows(call: Callable[[Any, Array], Array]) -> Callable[[Any, Array], Array]:
    """Shows a projection's ``__call__`` a matrix (N, in) in place of (..., in).

    The gradient of a weight then sums over one axis. Over two, (B, L), XLA's CPU backend first
    writes transposed copies of both operands, the larger part of such a gradient's time.
    """

    @functools.wraps(call)
    def on_rows(self: Any, x: Array) -> Array:
        y_NxF = call(self, x.reshape(-1, x.shape[-1]))
        return y_NxF.reshape(*x.shape[:-1], y_NxF.shape[-1])

    return on_rows
