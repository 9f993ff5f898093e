"""CoLA: ``y = silu(x A^T) B^T`` (Liu et al. 2025, arXiv 2502.10940, equation 2)."""

from __future__ import annotations

import jax

from loro_jax.layers.low_rank import LowRankLinear

Array = jax.Array


class ColaLinear(LowRankLinear):
    """``y = silu(x A^T) B^T``: an auto-encoder in place of a projection."""

    linear = False

    def activated(self, latent: Array) -> Array:
        """Applies the activation to ``x A^T``."""
        return jax.nn.silu(latent)

    def weight(self) -> Array:
        """Raises TypeError: no matrix computes the same function."""
        raise TypeError("ColaLinear: an activation between the factors; no matrix does the same.")
