"""Parts that all kinds of projection share: their specification, and untrained variables."""

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

# Name of ``x A^T``, which rematerialisation policies may save for the backward pass.
LATENT = "latent"


@dataclasses.dataclass(frozen=True)
class ProjectionSpec:
    """The specification of a projection.

    Attributes:
        kind: kind of a projection with a rank, a key of
            :data:`loro_jax.layers.projections.PROJECTIONS`.
        rank: inner dimension of a low-rank projection; None: dense.
        initialiser: how factors are drawn, a name known to :func:`loro_jax.initialise`.
        initializer_range: standard deviation of a dense weight's entries.
        alpha: the product of factors is scaled by ``alpha / rank`` (lora, sltrain).
        density: fraction of a sparse matrix's entries that are not zero (sltrain).
        scaffold_scale: size of the fixed matrix, relative to a dense initialisation (scaffold).
        scaffold_block: lower bound on the smaller side of its blocks; 0: one block (scaffold).
        dtype: dtype of the products.
        param_dtype: dtype of the stored weights.
    """

    kind: str = "low_rank"
    rank: int | None = None
    initialiser: str = "xavier"
    initializer_range: float = 0.02
    alpha: float = 32.0
    density: float = 0.03
    scaffold_scale: float = 1.0
    scaffold_block: int = 32
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32


class Fixed(nnx.Variable):
    """A variable of a model that is not trained and has no gradient."""


def named(latent: Array) -> Array:
    """Marks ``x A^T`` with its name for rematerialisation policies."""
    return checkpoint_name(latent, LATENT)


def by_rows(call: Callable[[Any, Array], Array]) -> Callable[[Any, Array], Array]:
    """Passes inputs (..., in) of a projection's ``__call__`` as matrices (N, in).

    The gradient of a weight then sums over one axis. For two axes, (B, L), XLA's CPU backend first
    writes transposed copies of both operands, which takes most of the gradient's time.
    """

    @functools.wraps(call)
    def on_rows(self: Any, x: Array) -> Array:
        # A reshape of leading axes moves no data.
        y_NxF = call(self, x.reshape(-1, x.shape[-1]))
        return y_NxF.reshape(*x.shape[:-1], y_NxF.shape[-1])

    return on_rows
