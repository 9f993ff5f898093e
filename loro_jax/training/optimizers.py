"""Makes each method's optimizer from a config.

Adam is the standard one with bias correction, except for LORO, which uses the authors' version. The
tables of these functions are in :mod:`loro_jax.training.methods`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import optax

from loro_jax.descent import riemannian_descent
from loro_jax.directions.adam import adam, scale_by_uncorrected_adam
from loro_jax.directions.orthogonal import orthogonal
from loro_jax.directions.protocol import as_direction
from loro_jax.directions.row_momentum import scale_by_rows
from loro_jax.fields import above, at_least, between, either, field, one_of
from loro_jax.loro import loro
from loro_jax.peers import (
    adarankgrad,
    coso,
    dct_adamw,
    fira,
    frugal,
    galore,
    gradnormlorp,
    lift,
    lora_plus,
    lowrank_restarts,
    muon,
    preconditioned,
    spectron,
    svd_projection,
    trion,
)
from loro_jax.peers.bases import BASES, MOMENTS, ORDERS
from loro_jax.peers.frugal import REMAINDERS
from loro_jax.peers.muon import scale_by_muon
from loro_jax.peers.trion import SHAPE_FACTORS
from loro_jax.peers.wide import in_float32
from loro_jax.training.registry import Direction, Making, Optimizer, projections_of_blocks

if TYPE_CHECKING:
    from loro_jax.training.config import Config

# A model's own factors are pairs even where both are square, at full rank.
_PAIRS = "all"

# Default lr_scale of dense projections with Muon, with which they move by 0.012 at a learning rate
# of 0.01: better than 0.024 at 2.56M tokens.
_MUON_SCALE = 1.2

# The same for Trion: its authors' rate, 0.02, at a learning rate of 0.01.
_TRION_SCALE = 2.0


@dataclasses.dataclass
class OrthogonalOptions:
    """Options of the direction "orthogonal"."""

    momentum: float = field(0.95, at_least(0, below=1), "decay of the averaged gradients")
    nesterov: bool = field(True, None, "whether to use Nesterov momentum")
    newton_schulz_steps: int = field(5, at_least(1), "iterations of the orthogonalisation")
    damping: float = field(
        1e-3, at_least(0), "damping of the factors' inverse roots, relative to mean eigenvalues"
    )
    equilibrate: bool = field(
        False, None, "whether rows of the longer side are normalised before the orthogonalisation"
    )
    row_moment: float = field(
        0.0,
        at_least(0, below=1),
        "decay of the mean squares by which rows of the longer side are divided; 0: none",
    )
    regular: str = field(
        "adam",
        one_of(("adam", "rows")),
        "direction of embedding and head: Adam, or momentum with rows of one size",
    )


@dataclasses.dataclass
class LowRankOptions:
    """Options of AdamW on factors."""

    b_ratio: float = field(
        1.0, above(0), "learning rate of the factors B, relative to that of A (LoRA+: 16)"
    )


@dataclasses.dataclass
class SpectronOptions:
    """Options of Spectron."""

    momentum: float = field(0.95, at_least(0, below=1), "decay of the averaged gradients")
    newton_schulz_steps: int = field(5, at_least(1), "iterations of the orthogonalisation")


@dataclasses.dataclass
class TrionOptions:
    """Options of Trion."""

    momentum: float = field(
        0.95, at_least(0, below=1), "part of the momentum in the subspace that is kept"
    )
    newton_schulz_steps: int = field(5, at_least(1), "iterations of the orthogonalisation")
    shape_factor: str = field(
        "kj", one_of(SHAPE_FACTORS), "factor on the steps by the shape of a matrix"
    )


@dataclasses.dataclass
class DCTAdamWOptions:
    """Options of DCT-AdamW."""

    update_every: int = field(1, at_least(1), "steps between choices of columns")
    scale: float = field(1.0, at_least(0), "factor on the steps of the projections")
    error_feedback: bool = field(
        False, None, "whether the part of a gradient outside of the subspace is added to the next"
    )
    max_side: int = field(
        32_000, at_least(1), "projections with a side of at least this length get AdamW"
    )


@dataclasses.dataclass
class PreconditionedOptions:
    """Options of scaled AdamW."""

    damping: float = field(1e-6, at_least(0), "added to the diagonals of the Gram matrices")


@dataclasses.dataclass
class GaLoreOptions:
    """Options of GaLore."""

    scale: float = field(0.25, at_least(0), "alpha, a factor on the steps of projected gradients")
    basis: str = field("svd", one_of(BASES), "the kind of subspace that gradients are projected to")
    moments: str = field(
        "keep", one_of(MOMENTS), "what happens to moments when the subspace changes"
    )


@dataclasses.dataclass
class FiraOptions(GaLoreOptions):
    """Options of Fira."""

    gamma: float = field(1.01, at_least(1), "largest growth of the remainder's norm in a step")


@dataclasses.dataclass
class AdaRankGradOptions:
    """Options of AdaRankGrad."""

    scale: float = field(0.25, at_least(0), "alpha, a factor on the steps of projected gradients")
    basis: str = field(
        "randomised", either("randomised", "svd"), "how the gradients' subspaces are computed"
    )
    eta: float = field(
        0.04, at_least(0, below=1), "fraction of the gradient's squared norm that may be lost"
    )
    tolerance: float = field(
        0.1,
        at_least(0, below=1),
        "a subspace is renewed when the projected gradient's norm falls below this fraction",
    )


@dataclasses.dataclass
class FrugalOptions:
    """Options of FRUGAL."""

    density: float = field(0.25, between(0, 1), "rho, the share of the projections with state")
    basis: str = field("blocks", one_of(BASES), "the kind of subspace that has state")
    order: str = field("descending", one_of(ORDERS), "in which order blocks takes the layers")
    scale: float = field(1.0, at_least(0), "factor on the steps of the projections")
    remainder: str = field(
        "sign_sgd", one_of(REMAINDERS), "the step of the gradient's part outside of the subspace"
    )
    remainder_scale: float = field(1.0, at_least(0), "c, a factor on the step of that part")


@dataclasses.dataclass
class CoSOOptions:
    """Options of CoSO."""

    scale: float = field(1.0, at_least(0), "alpha, a factor on the steps of projected gradients")
    sketch_rank: int = field(
        100, at_least(1), "columns of the sketch that collects a task's gradients"
    )
    memory: float = field(
        0.5, between(0, 1), "largest share of the smaller side whose directions are remembered"
    )
    threshold: float = field(
        0.98,
        above(0, most=1),
        "share of the sketch's energy that the directions remembered after a task hold",
    )


@dataclasses.dataclass
class LiftOptions:
    """Options of LIFT."""

    filter_rank: int = field(
        128, at_least(1), "f, the rank of the approximation whose largest entries are trained"
    )


def make_loro(direction: Direction, of_direction: Any, making: Making) -> Optimizer:
    """Makes LORO.

    Args:
        direction: the entry of the config's direction.
        of_direction: that direction's options.
        making: config, schedule and mesh.
    """
    config = making.config
    made = as_direction(direction.make(config, of_direction))
    return loro(
        making.schedule,
        direction=made,
        # In a config 0 stands for None, as in some of the fields below.
        exact_every=config.exact_every or None,
        moments=config.resolved_moments,
        lr_scale=direction.lr_scale if config.lr_scale is None else config.lr_scale,
        # Directions that are moves apply only to factors: another steps the rest.
        regular=_regular_of_loro(of_direction, making) if made.kind == "moves" else None,
        weight_decay=config.weight_decay,
        max_move=config.max_move or None,
        damping=config.damping or None,
        exact_method=config.exact_method,
        basis=config.basis,
        pairs=_PAIRS,
        mesh=making.mesh,
    )


def adam_of_loro(config: Config, options: Any) -> Any:
    """Makes LORO's default direction."""
    return adam(config.b1, config.b2, config.eps)


def orthogonal_of_loro(config: Config, options: OrthogonalOptions) -> Any:
    """Makes orthogonalised momentum for LORO."""
    return orthogonal(**_shared(options), damping=options.damping)


def _shared(options: OrthogonalOptions) -> dict[str, Any]:
    """Returns the options that factors and dense matrices have in common."""
    names = ("momentum", "nesterov", "newton_schulz_steps", "equilibrate", "row_moment")
    return {name: getattr(options, name) for name in names}


def _regular_of_loro(options: Any, making: Making) -> Any:
    if getattr(options, "regular", "adam") == "adam":
        return adam(**making.adam)
    return as_direction(_by_rows(scale_by_uncorrected_adam(**making.adam)))


def _by_rows(others: optax.GradientTransformation) -> optax.GradientTransformation:
    """Returns momentum by rows for embedding and head, and ``others`` for the rest."""

    def labels(params: Any) -> Any:
        # Norms' scales in the blocks are stacked: two axes do not make them matrices.
        return jax.tree_util.tree_map_with_path(
            lambda path, p: "others" if path[0].key == "blocks" or p.ndim < 2 else "rows", params
        )

    return optax.partition({"rows": scale_by_rows(), "others": others}, labels)


def adamw(making: Making, decayed: Any = None) -> Optimizer:
    """Makes AdamW for all parameters; factors may have their own learning rate.

    Args:
        making: config, schedule and mesh.
        decayed: parameters -> which of them decay; None: all.
    """
    # Without exact steps this is AdamW, in which the factors may have their own rate.
    return riemannian_descent(
        making.schedule,
        in_float32(optax.scale_by_adam(**making.adam)),
        None,
        exact_every=None,
        moments="keep",
        lr_scale=making.lr_scale,
        weight_decay=(making.config.weight_decay, decayed),
        pairs=_PAIRS,
        mesh=making.mesh,
    )


def make_lowrank(making: Making) -> Optimizer:
    """Makes AdamW with another learning rate for the factors B (Hayou et al. 2024, LoRA+)."""
    everything, ratio = adamw(making), making.options.b_ratio
    if ratio == 1:
        return everything
    return optax.chain(everything, lora_plus(ratio, pairs=_PAIRS))


def dense_adamw(making: Making, of_direction: Any) -> Optimizer:
    """Makes AdamW for a dense model, whose projections may have their own learning rate."""
    everything = adamw(making)
    if making.config.lr_scale is None:
        return everything
    # Scaling updates is the same as scaling the rate, decay included: all of it is linear.
    scaled = optax.masked(optax.scale(making.config.lr_scale), projections_of_blocks)
    return optax.chain(everything, scaled)


def dense_muon(making: Making, of_direction: OrthogonalOptions) -> Optimizer:
    """Makes Muon for a dense model."""
    config = making.config
    by_rows = of_direction.regular == "rows"
    return muon(
        making.schedule,
        projected=projections_of_blocks,
        lr_scale=_MUON_SCALE if config.lr_scale is None else config.lr_scale,
        direction=scale_by_muon(**_shared(of_direction)),
        regular=_by_rows(optax.scale_by_adam(**making.adam)) if by_rows else None,
        weight_decay=config.weight_decay,
        **making.adam,
    )


def make_lowrank_restarts(making: Making) -> Optimizer:
    """Makes low-rank AdamW with balanced restarts."""
    return _balanced(lowrank_restarts, making, making.lr_scale)


def make_svd_projection(making: Making) -> Optimizer:
    """Makes LORO with only its retraction."""
    return _balanced(svd_projection, making, making.config.lr_scale)


def _balanced(
    method: Callable[..., Optimizer], making: Making, lr_scale: float | None
) -> Optimizer:
    return method(
        making.schedule,
        every=making.config.exact_every,
        direction=in_float32(optax.scale_by_adam(**making.adam)),
        lr_scale=lr_scale,
        weight_decay=making.config.weight_decay,
        pairs=_PAIRS,
        mesh=making.mesh,
    )


def make_preconditioned(making: Making) -> Optimizer:
    """Makes scaled AdamW."""
    return preconditioned(making.schedule, exact_every=None, **_of_preconditioned(making))


def make_preconditioned_exact(making: Making) -> Optimizer:
    """Makes scaled AdamW with LORO's exact steps."""
    config = making.config
    return preconditioned(
        making.schedule,
        exact_every=config.exact_every,
        exact_method=config.exact_method,
        max_move=config.max_move or None,
        **_of_preconditioned(making),
    )


def _of_preconditioned(making: Making) -> dict[str, Any]:
    return {
        "lr_scale": making.lr_scale,
        "damping": making.options.damping,
        "weight_decay": making.config.weight_decay,
        "pairs": _PAIRS,
        "mesh": making.mesh,
        "direction": adam(**making.adam),
    }


def make_spectron(making: Making) -> Optimizer:
    """Makes Spectron for the factors."""
    return spectron(
        making.schedule,
        lr_scale=making.lr_scale,
        momentum=making.options.momentum,
        newton_schulz_steps=making.options.newton_schulz_steps,
        weight_decay=making.config.weight_decay,
        regular=adam(**making.adam),
        pairs=_PAIRS,
    )


def make_dct_adamw(making: Making) -> Optimizer:
    """Makes DCT-AdamW for the projections."""
    return dct_adamw(making.schedule, **_of_columns(making))


def make_trion(making: Making) -> Optimizer:
    """Makes Trion for the projections."""
    lr_scale = making.config.lr_scale
    return trion(
        making.schedule,
        lr_scale=_TRION_SCALE if lr_scale is None else lr_scale,
        **_of_columns(making),
    )


def _of_columns(making: Making) -> dict[str, Any]:
    """Returns the arguments of methods that choose columns of a basis, including their options."""
    return {
        "rank": making.config.model.rank,
        "projected": projections_of_blocks,
        "weight_decay": making.config.weight_decay,
        **making.adam,
        # Fields of the options have the names of the arguments.
        **dataclasses.asdict(making.options),
    }


def make_galore(making: Making) -> Optimizer:
    """Makes GaLore for the projections."""
    return galore(making.schedule, **_of_projected(making))


def make_fira(making: Making) -> Optimizer:
    """Makes Fira for the projections."""
    return fira(making.schedule, **_of_projected(making))


def make_gradnormlorp(making: Making) -> Optimizer:
    """Makes GradNormLoRP for the projections."""
    return gradnormlorp(making.schedule, **_of_projected(making))


def make_adarankgrad(making: Making) -> Optimizer:
    """Makes AdaRankGrad for the projections."""
    return adarankgrad(making.schedule, **_of_projected(making))


def make_coso(making: Making) -> Optimizer:
    """Makes CoSO for the projections."""
    arguments = _of_projected(making)
    # Between tasks, not within one.
    del arguments["threshold"]
    return coso(making.schedule, **arguments)


def make_lift(making: Making) -> Optimizer:
    """Makes LIFT for the projections."""
    return lift(making.schedule, **_of_projected(making))


def make_frugal(making: Making) -> Optimizer:
    """Makes FRUGAL for the projections."""
    return frugal(making.schedule, **_of_shares(making))


def _of_projected(making: Making) -> dict[str, Any]:
    """Returns the arguments of methods that project gradients to the model's rank."""
    return {"rank": making.config.model.rank, **_of_shares(making)}


def _of_shares(making: Making) -> dict[str, Any]:
    """Returns the arguments of all methods that project gradients, including their options."""
    return {
        "projected": projections_of_blocks,
        "update_every": making.config.exact_every,
        "weight_decay": making.config.weight_decay,
        **making.adam,
        # Fields of the options have the names of the arguments.
        **dataclasses.asdict(making.options),
    }
