"""CoLA: ``y = silu(x A^T) B^T`` (Liu et al. 2025, arXiv 2502.10940, equation 2)."""

from __future__ import annotations

import jax

from loro_jax.layers.low_rank import LowRankLinear

Array = jax.Array


class ColaLinear(LowRankLinear):
    """``y = silu(x A^T) B^T``: an auto-encoder in a projection's place."""

    linear = False

    def activated(self, latent: Array) -> Array:
        """What the second factor sees of ``x A^T``."""
        return jax.nn.silu(latent)

    def weight(self) -> Array:
        """There is none: raises TypeError."""
        raise TypeError("ColaLinear: an activation between the factors; no matrix does the same.")
