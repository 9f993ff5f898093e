"""Low-rank projections: ``B`` (out x r) and ``A`` (r x in), ``y = (x A^T) B^T``; no ``W``."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from loro_jax.layers.common import (
    Original,
    ProjectionSpec,
    TakesPlace,
    by_rows,
    make_bias,
    named,
    products_dtype,
    with_bias,
)
from loro_jax.layers.kernels import product
from loro_jax.layers.sharding import latent_sharding
from loro_jax.lowrank import initialise

Array = jax.Array


class LowRankLinear(TakesPlace):
    """``y = (x A^T) B^T`` with B (out x r) and A (r x in), plus a bias where the spec asks for one.

    Args:
        in_features: size of the input's last axis.
        out_features: size of the output's last axis.
        spec: specification, with a rank.
        rngs: NNX random streams; the ``params`` stream is used.

    Attributes:
        original: the layer that :func:`loro_jax.layers.factorise` replaced by this one; None: there
            was none.

    Example:
        >>> projection = LowRankLinear(8, 6, ProjectionSpec(rank=2, use_bias=True), nnx.Rngs(0))
        >>> projection(jnp.ones((4, 5, 8))).shape
        (4, 5, 6)
    """

    # Whether y = up(down(x)); False for kinds that add other terms.
    through_rank = True
    # Whether the function depends only on the product B A.
    linear = True
    # Whether the rank must be below the smaller side, because other directions are held beside it.
    below_full_rank = False

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
        self.bias = nnx.data(make_bias(spec, out_features))
        self.dtype = spec.dtype
        self.precision = spec.precision
        self.original: Original | None = None

    @property
    def rank(self) -> int:
        """Inner dimension r."""
        return self.B.shape[-1]

    def first(self) -> Array:
        """Returns A, which is applied to the input, in the dtype of the products."""
        return self.A[...].astype(self.A.dtype if self.dtype is None else self.dtype)

    def rest(self, y: Array) -> Array:
        """Maps ``x A^T`` to the output."""
        return self.up(self.activated(y))

    def factors(self) -> tuple[Array, Array]:
        """Returns B and A in the dtype of the products."""
        dtype = products_dtype(self.dtype, self.B[...], self.A[...])
        return self.B[...].astype(dtype), self.A[...].astype(dtype)

    def down(self, x: Array) -> Array:
        """Maps (..., in) to the latent (..., r)."""
        # Named before the activation, which is cheap to recompute in the backward pass.
        x = x.astype(products_dtype(self.dtype, x, self.A[...]))
        A = self.first().astype(x.dtype)
        # Not in every product: the argument would be part of programs without a mesh, too.
        sharding = latent_sharding(x)
        options: dict[str, Any] = {} if sharding is None else {"out_sharding": sharding}
        return self.activated(named(jnp.matmul(x, A.T, precision=self.precision, **options)))

    def activated(self, latent: Array) -> Array:
        """Returns ``x A^T`` unchanged; kinds with an activation override this."""
        return latent

    def up(self, latent: Array) -> Array:
        """Maps the latent (..., r) to (..., out)."""
        B = self.B[...].astype(latent.dtype)
        return with_bias(jnp.matmul(latent, B.T, precision=self.precision), self.bias)

    @by_rows
    def __call__(self, x: Array) -> Array:
        """Maps (..., in) to (..., out) through the rank."""
        return self.up(self.down(x))

    def product(self) -> Array:
        """Returns B A, (out, in), in float32 or wider."""
        return product(self.B[...], self.A[...])

    @staticmethod
    def flops(m: int, n: int, spec: ProjectionSpec, tokens: float) -> float:
        """Returns the operations per token, forward and backward.

        Args:
            m: outputs.
            n: inputs.
            spec: specification, with a rank.
            tokens: tokens per pass, over which operations done once per pass are divided.
        """
        assert spec.rank is not None  # make_projection chose this class by it
        return 6.0 * spec.rank * (m + n)

    def weight(self) -> Array:
        """Returns the weight B A, (out, in), in float32 or wider."""
        return self.product()
