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
        initialiser: how factors B and A are drawn, a name known to :func:`loro_jax.initialise`;
            None or "lora": as the kind says, with dW = 0. With others dW is not zero at the start,
            and is subtracted from the weight that is adapted (:attr:`absorbs`).
        density: share of a weight's entries that are trained (sltrain).
        param_dtype: dtype of the trained arrays.
        seed: fixes random arrays that layers share (RandLoRA's bases).
    """

    kind: str = "lora"
    rank: int = 8
    alpha: float = 16.0
    rank_stabilised: bool = False
    initialiser: str | None = None
    density: float = 0.005
    param_dtype: Any = jnp.float32
    seed: Any = 0

    @property
    def absorbs(self) -> bool:
        """Whether the initial dW is subtracted from W, so that W + dW starts as W was.

        The paper's authors do so in their code for fine-tuning (with "xavier"). Both factors are
        then well-conditioned from the start, as an exact step of LORO requires: next to B = 0, any
        step of a direction such as Adam's is a large one.
        """
        return self.initialiser not in (None, "lora")

    @property
    def scale(self) -> float:
        """Factor s of the product B A."""
        return self.alpha / (self.rank**0.5 if self.rank_stabilised else self.rank)
