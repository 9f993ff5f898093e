"""Projections that add the output of the same projection one layer below (CR-Net, ICLR 2026).

``Y_l = b_l Y_(l-1) + P_l(x_l)``, where P is a projection with a rank and b a trained number for
each projection and layer. The lowest layer adds zeros. A sum of low-rank outputs of all layers up
to this one has a rank above that of each, for next to no parameters and operations.

The loop over layers carries the outputs from each layer to the next. They are those of the same
tokens, so that decoding carries them in the same way and caches nothing more.

Shapes: as in :mod:`models.llama`; C outputs of a projection.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from models.config import GROUPS, LlamaConfig
from models.layout import by_sequence

Array = jax.Array

# Outputs (B, L, C) of a layer's projections, by name.
Outputs = dict[str, Array]


class Gates(nnx.Module):
    """The numbers b of a group of projections, by the projections' names."""

    def __init__(self, names: Sequence[str], start: float, dtype: Any):
        for name in names:
            setattr(self, name, nnx.Param(jnp.full((), start, dtype)))


class Crossing:
    """What one layer takes from the layer below and passes to the layer above.

    Attributes:
        below: outputs of the layer below.
        above: outputs of this layer, as far as they are computed.

    Example:
        >>> crossing = Crossing({"o": jnp.ones((1, 2, 3))})
        >>> (y,) = crossing.add(Gates(["o"], 0.5, jnp.float32), o=jnp.ones((1, 2, 3)))
        >>> float(y[0, 0, 0]), list(crossing.above)
        (1.5, ['o'])
    """

    def __init__(self, below: Outputs):
        self.below = below
        self.above: Outputs = {}

    def add(self, gates: Gates | None, **outputs: Array) -> list[Array]:
        """Adds the outputs of the layer below to those of some projections.

        Args:
            gates: the numbers b; None: nothing is added, and nothing passed on.
            **outputs: outputs of the projections, by name.

        Returns:
            The sums, in the order of the projections.
        """
        if gates is None:
            return list(outputs.values())
        for name, y_BxLxC in outputs.items():
            b = getattr(gates, name)[...].astype(y_BxLxC.dtype)
            self.above[name] = y_BxLxC + b * self.below[name]
        return [self.above[name] for name in outputs]


def crosses(config: LlamaConfig, group: str) -> bool:
    """Returns whether the projections of "attn" or "mlp" add outputs of the layer below."""
    return bool(config.cross_layer) and config.group_rank(group) is not None


def make_gates(config: LlamaConfig, group: str) -> Gates | None:
    """Makes the numbers b of "attn" or "mlp"; None if nothing crosses layers there."""
    if not crosses(config, group):
        return None
    return Gates(tuple(config.shapes(group)), config.cross_layer, jnp.dtype(config.param_dtype))


def nothing_below(config: LlamaConfig, x_BxLxD: Array) -> Outputs:
    """Returns what the lowest layer adds to its outputs: zeros; empty if nothing crosses layers."""
    return {
        name: by_sequence(jnp.zeros((*x_BxLxD.shape[:2], outputs), x_BxLxD.dtype))
        for group in GROUPS
        if crosses(config, group)
        for name, (outputs, _) in config.shapes(group).items()
    }
