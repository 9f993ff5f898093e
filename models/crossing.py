"""What projections take from the same projections of the layer below.

* Outputs (CR-Net): ``Y_l = b_l Y_(l-1) + B_l A_l x_l`` with a trained number b_l for each
  projection and layer.
* Latents (LaX, arXiv 2505.21732, with an identity gate): ``y_l = B_l (z_l + z_(l-1))`` with
  ``z_l = A_l x_l``, after its activation if there is one.

The loop over layers carries them from each layer to the next; the lowest layer takes zeros. Only
projections with a rank take part. Shapes: as in :mod:`models.llama`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx

from loro_jax.layers.packing import apply_together, as_low_rank
from loro_jax.layers.projections import PROJECTIONS
from models.layout import by_sequence

if TYPE_CHECKING:
    from models.llama import LlamaConfig

Array = jax.Array

# Outputs (B, L, m) or latents (B, L, r) of projections by name.
Carried = dict[str, Array]


class Gates(nnx.Module):
    """The numbers b of a group of projections, by the projections' names."""

    def __init__(self, names: Sequence[str], start: float, dtype: Any):
        for name in names:
            setattr(self, name, nnx.Param(jnp.full((), start, dtype)))


class Crossing:
    """One layer's exchange with its neighbours.

    Attributes:
        below: what the layer below has collected; of each projection that takes part.
        above: what this layer has collected so far, for the layer above.
    """

    def __init__(self, below: Carried):
        self.below = below
        self.above: Carried = {}


def make_gates(config: LlamaConfig, group: str) -> Gates | None:
    """Makes the numbers b of "attn" or "mlp"; None if their outputs don't cross layers."""
    if not config.cross_layer or config.group_rank(group) is None:
        return None
    return Gates(tuple(config.shapes(group)), config.cross_layer, jnp.dtype(config.param_dtype))


def nothing_below(config: LlamaConfig, x_BxLxD: Array) -> Carried:
    """Returns what the lowest layer takes: zeros for each projection that takes part."""
    if not crosses(config):
        return {}
    sizes = {
        name: rank if config.latent_crossing else outputs
        for group in ("attn", "mlp")
        if (rank := config.group_rank(group)) is not None
        for name, (outputs, _) in config.shapes(group).items()
    }
    return {
        name: by_sequence(jnp.zeros((*x_BxLxD.shape[:2], size), x_BxLxD.dtype))
        for name, size in sizes.items()
    }


def apply_crossed(
    part: Any, names: Sequence[str], x: Array, crossing: Crossing | None
) -> list[Array]:
    """Applies projections of one input, together with what they take from the layer below.

    Args:
        part: the module that has the projections, and their ``gates`` and ``shared``.
        names: the projections' names.
        x: their input.
        crossing: the layer's exchange; values for the layer above are added to it. None: none.

    Returns:
        The output of each.
    """
    projections = [getattr(part, name) for name in names]
    if crossing is None or names[0] not in crossing.below:
        if len(projections) == 1:
            return [projections[0](x)]
        return apply_together(projections, x, shared=part.shared)
    of_outputs = part.gates is not None
    found = apply_together(projections, x, latent=[not of_outputs] * len(projections))
    outputs = []
    for name, projection, y in zip(names, projections, found, strict=True):
        below = crossing.below[name]
        if of_outputs:
            y = y + getattr(part.gates, name)[...].astype(y.dtype) * below
            crossing.above[name] = y
        else:
            crossing.above[name] = y
            y = as_low_rank(projection).up(y + below)
        outputs.append(y)
    return outputs


def crosses(config: LlamaConfig) -> bool:
    """Returns whether anything crosses layers."""
    return config.scope != "none" and (bool(config.cross_layer) or config.latent_crossing)


def check_crossing(config: LlamaConfig) -> None:
    """Raises ValueError for fields of the crossing that don't fit the others."""
    if config.cross_layer and config.latent_crossing:
        raise ValueError(
            f"model.latent_crossing = True with model.cross_layer = {config.cross_layer}: either "
            "outputs or latents cross layers; expected latent_crossing False, or cross_layer 0."
        )
    if config.latent_crossing and not PROJECTIONS[config.projection].through_rank:
        raise ValueError(
            "model.latent_crossing = True needs projections that are their latents alone, but "
            f'model.projection is "{config.projection}"; expected "low_rank" or "cola".'
        )


def refuse_crossing(config: LlamaConfig, what: str, error: type[ValueError] = ValueError) -> None:
    """Raises an error if anything crosses layers, where that is not supported."""
    if crosses(config):
        name = "cross_layer" if config.cross_layer else "latent_crossing"
        raise error(
            f"model.{name} = {getattr(config, name)}: not supported in {what}; expected a model "
            "in which nothing crosses layers."
        )
