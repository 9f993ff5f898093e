"""Every kind of projection behind one constructor.

A projection maps ``x (..., in)`` to ``y (..., out)`` without a bias. Kinds:

* dense: ``W`` (out x in), ``y = x W^T``;
* low-rank: ``B`` (out x r) and ``A`` (r x in), ``y = (x A^T) B^T``; ``W = B A`` is never formed.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from loro_jax.lowrank import initialise

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class ProjectionSpec:
    """What a projection is made of.

    Attributes:
        rank: inner dimension of a low-rank projection; None: dense.
        initialiser: how factors are drawn, a name known to :func:`loro_jax.initialise`.
        initializer_range: standard deviation of a dense weight's entries.
        dtype: dtype of the products.
        param_dtype: dtype of the stored weights.
    """

    rank: int | None = None
    initialiser: str = "xavier"
    initializer_range: float = 0.02
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32


class Dense(nnx.Module):
    """``y = x W^T`` with W (out x in)."""

    def __init__(self, in_features: int, out_features: int, spec: ProjectionSpec, rngs: nnx.Rngs):
        shape = (out_features, in_features)
        W = spec.initializer_range * jax.random.normal(rngs.params(), shape, jnp.float32)
        self.W = nnx.Param(W.astype(spec.param_dtype))
        self.dtype = spec.dtype

    def __call__(self, x: Array) -> Array:
        """Maps (..., in) to (..., out)."""
        return x.astype(self.dtype) @ self.W[...].astype(self.dtype).T


class LowRankLinear(nnx.Module):
    """``y = (x A^T) B^T`` with B (out x r) and A (r x in)."""

    def __init__(self, in_features: int, out_features: int, spec: ProjectionSpec, rngs: nnx.Rngs):
        assert spec.rank is not None  # make_projection chose this class by it
        B, A = initialise(
            rngs.params(),
            out_features,
            in_features,
            spec.rank,
            spec.initialiser,
            spec.initializer_range,
        )
        self.B = nnx.Param(B.astype(spec.param_dtype))
        self.A = nnx.Param(A.astype(spec.param_dtype))
        self.dtype = spec.dtype

    def __call__(self, x: Array) -> Array:
        """Maps (..., in) to (..., out) by way of the rank."""
        A, B = self.A[...].astype(self.dtype), self.B[...].astype(self.dtype)
        return (x.astype(self.dtype) @ A.T) @ B.T


def make_projection(
    in_features: int, out_features: int, spec: ProjectionSpec, rngs: nnx.Rngs
) -> Dense | LowRankLinear:
    """Makes the projection that a spec describes.

    Args:
        in_features: size of the input's last axis.
        out_features: size of the output's last axis.
        spec: kind, rank, initialiser and dtypes.
        rngs: NNX random streams; the ``params`` stream is used.

    Returns:
        A module that maps (..., in_features) to (..., out_features).

    Raises:
        ValueError: if the rank is below 1 or above min(in_features, out_features).

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> projection = make_projection(8, 6, ProjectionSpec(rank=2), nnx.Rngs(0))
        >>> projection(jnp.ones((4, 8))).shape
        (4, 6)
    """
    kind = Dense if spec.rank is None else LowRankLinear
    return kind(in_features, out_features, spec, rngs)
