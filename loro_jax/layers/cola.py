"""CoLA: ``y = s(x A^T) B^T`` (Liu et al. 2025, arXiv 2502.10940, equation 2, with s = silu)."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx

from loro_jax.layers.common import ProjectionSpec
from loro_jax.layers.low_rank import LowRankLinear

Array = jax.Array

# silu; relu2, the square of a ReLU; cos, a learnable cosine of a cosine per coordinate (NOBLE,
# arXiv 2603.06492, without the matrix between the two cosines).
ACTIVATIONS = ("silu", "relu2", "cos")


class ColaLinear(LowRankLinear):
    """``y = s(x A^T) B^T``: an auto-encoder in place of a projection."""

    linear = False

    def __init__(self, in_features: int, out_features: int, spec: ProjectionSpec, rngs: nnx.Rngs):
        super().__init__(in_features, out_features, spec, rngs)
        self.activation = spec.activation
        if spec.activation == "cos":
            ones = jnp.ones(self.rank, spec.param_dtype)
            # Of each coordinate, the inner cosine first. With these phases both are sines at the
            # start: s(z) = sin(sin(z)) is centred and has slope 1 at 0.
            self.frequencies = nnx.Param(jnp.stack([ones, ones]))
            self.phases = nnx.Param(jnp.stack([ones, ones]) * (-math.pi / 2))

    def activated(self, latent: Array) -> Array:
        """Applies the activation to ``x A^T``."""
        if self.activation == "relu2":
            return jnp.square(jax.nn.relu(latent))
        if self.activation == "cos":
            frequencies = self.frequencies[...].astype(latent.dtype)
            phases = self.phases[...].astype(latent.dtype)
            inner = jnp.cos(frequencies[0] * latent + phases[0])
            return jnp.cos(frequencies[1] * inner + phases[1])
        return jax.nn.silu(latent)

    def weight(self) -> Array:
        """Raises TypeError: no matrix computes the same function."""
        raise TypeError("ColaLinear: an activation between the factors; no matrix does the same.")
