"""The specification of an adapter."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class AdapterSpec:
    """The specification of an adapter.

    Attributes:
        kind: a key of :data:`loro_jax.layers.adapters.ADAPTERS`.
        rank: r, its inner dimension.
        alpha: the product of factors is scaled by ``alpha / rank``.
        rank_stabilised: whether it is scaled by ``alpha / sqrt(rank)`` instead (rsLoRA,
            Kalajdzievski 2023, arXiv 2312.03732).
        initialiser: how factors are drawn, a name known to :func:`loro_jax.initialise`; None: the
            kind's own.
        param_dtype: dtype of the trained arrays.
    """

    kind: str = "lora"
    rank: int = 8
    alpha: float = 16.0
    rank_stabilised: bool = False
    initialiser: str | None = None
    param_dtype: Any = jnp.float32

    @property
    def scale(self) -> float:
        """Factor s of the product B A."""
        return self.alpha / (self.rank**0.5 if self.rank_stabilised else self.rank)
