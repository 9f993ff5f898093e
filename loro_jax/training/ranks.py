"""Methods that choose ranks: those of adapters (AdaLoRA, IncreLoRA, SoRA, CoDyRA), and TRP."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from loro_jax.fields import above, at_least, between, field
from loro_jax.layers.adapters import ADAPTERS
from loro_jax.peers import adalora, codyra, increlora, sora, trp
from loro_jax.peers.soft_threshold import is_gate
from loro_jax.training.optimizers import adamw, dense_adamw
from loro_jax.training.registry import (
    Maintenance,
    Making,
    Method,
    Optimizer,
    projections_of_blocks,
)

if TYPE_CHECKING:
    from loro_jax.training.config import Config


@dataclasses.dataclass
class AdaLoRAOptions:
    """Options of AdaLoRA."""

    target: float = field(
        2 / 3, above(0, 1), "average rank at the end, a share of adapter.rank: 8 of 12"
    )
    initial: float = field(0.1, at_least(0, below=1), "share of the run before the first prune")
    final: float = field(
        0.5, at_least(0, below=1), "share of the run after the budget's last change"
    )
    prune_every: int = field(100, at_least(1), "steps between two prunes")
    orthogonality: float = field(0.1, at_least(0), "weight of the orthogonality penalty")
    b_importance: float = field(0.85, at_least(0, below=1), "decay of the average sensitivity")
    b_uncertainty: float = field(0.85, at_least(0, below=1), "decay of its average deviation")


@dataclasses.dataclass
class IncreLoRAOptions:
    """Options of IncreLoRA."""

    target: float = field(
        0.25, above(0, 1), "average rank at the end, a share of adapter.rank: 2 of 8"
    )
    grow_from: int = field(1_000, at_least(0), "last step before ranks are opened")
    grow_every: int = field(1_000, at_least(1), "steps between two rounds of growth")
    top: int = field(2, at_least(1), "adapters that open ranks in a round")
    ranks_per_round: int = field(1, at_least(1), "ranks that each of them opens")
    orthogonality: float = field(0.1, at_least(0), "weight of the orthogonality penalty")
    b_importance: float = field(0.85, at_least(0, below=1), "decay of the average score")
    b_uncertainty: float = field(0.85, at_least(0, below=1), "decay of its average deviation")


@dataclasses.dataclass
class SoRAOptions:
    """Options of SoRA."""

    penalty: float = field(10.0, at_least(0), "weight of the mean of |g| over all gates")
    threshold: float = field(3e-4, at_least(0), "what gates shrink by after each step")


@dataclasses.dataclass
class CoDyRAOptions:
    """Options of CoDyRA."""

    threshold: float = field(0.005, at_least(0), "what gates shrink by after the last steps")
    dense: float = field(0.5, between(0, 1), "share of the run without a threshold")
    stages: int = field(50, at_least(1), "number of stages in which the threshold grows")


@dataclasses.dataclass
class TRPOptions:
    """Options of TRP."""

    energy: float = field(
        0.9, above(0, most=1), "share of the squared singular values that a truncation keeps"
    )
    nuclear: float = field(3e-4, at_least(0), "weight of the nuclear norm")


def _adalora(making: Making) -> Optimizer:
    options = dataclasses.asdict(making.options)
    return adalora(adamw(making), making.config.steps, **options)


def _increlora(making: Making) -> Optimizer:
    return increlora(
        adamw(making),
        making.config.steps,
        learning_rate=making.schedule,
        warmup_steps=making.config.warmup_steps,
        **dataclasses.asdict(making.options),
    )


def _sora(making: Making) -> Optimizer:
    return sora(adamw(making, _no_gate), **dataclasses.asdict(making.options))


def _codyra(making: Making) -> Optimizer:
    options = dataclasses.asdict(making.options)
    return codyra(adamw(making), making.config.steps, **options)


def _trp(making: Making) -> Optimizer:
    return trp(
        dense_adamw(making, None),
        lambda step: making.lr_scale * making.schedule(step),
        projected=projections_of_blocks,
        update_every=making.config.exact_every,
        **dataclasses.asdict(making.options),
    )


def _no_gate(params: Any) -> Any:
    return jax.tree.map(lambda flag: not flag, is_gate(params))


def count_live(config: Config, options: Any) -> Maintenance:
    """Counts, in each step's metrics, the ranks of all adapters whose gate is not zero."""

    def metrics(params: Any, opt_state: Any) -> dict[str, jax.Array]:
        counts = [jnp.count_nonzero(gates) for gates in gates_of(config, params)]
        return {"live_ranks": jnp.sum(jnp.array(counts))}

    return Maintenance(metrics=metrics)


def _count_open(config: Config, options: IncreLoRAOptions) -> Maintenance:
    """Counts the ranks that are open; those in reserve are not zero, either."""

    def metrics(params: Any, opt_state: Any) -> dict[str, jax.Array]:
        counts = [jnp.sum(one.rank) for one in opt_state.adapters]
        return {"live_ranks": jnp.sum(jnp.array(counts))}

    return Maintenance(metrics=metrics)


def gates_of(config: Config, params: Any) -> list[Any]:
    """Returns the gates of all adapters: arrays (..., r), or their shapes.

    Args:
        config: the run's config.
        params: its trained parameters, nested dicts; empty of gates for other kinds of adapter.
    """
    name = getattr(ADAPTERS[config.adapter_kind], "gates", None)
    return [
        leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]
        if [entry.key for entry in path[-2:]] == ["adapter", name]
    ]


def _count_kept(config: Config, options: AdaLoRAOptions) -> Maintenance:
    """Counts the ranks that the last prune has kept; others are trained until the next one."""
    if options.initial + options.final >= 1:
        raise ValueError(
            f"method_options.initial + method_options.final must be below 1, so that ranks are "
            f"pruned between, but are {options.initial} and {options.final}."
        )

    def metrics(params: Any, opt_state: Any) -> dict[str, jax.Array]:
        return {"live_ranks": opt_state.kept}

    return Maintenance(metrics=metrics)


def _mean_rank(config: Config, options: TRPOptions) -> Maintenance:
    """Adds the mean rank of all matrices at the last truncation to each step's metrics."""

    def metrics(params: Any, opt_state: Any) -> dict[str, jax.Array]:
        ranks = jax.tree.leaves(opt_state.rank["blocks"])
        stacked = jnp.stack([jnp.mean(rank.astype(jnp.float32)) for rank in ranks if rank.ndim])
        return {"mean_rank": jnp.mean(stacked)}

    return Maintenance(metrics=metrics)


METHODS: dict[str, Method] = {
    "adalora": Method(
        "AdamW on adapters, whose least important ranks are pruned",
        _adalora,
        uses=("lr_scale",),
        options=AdaLoRAOptions,
        maintenance=_count_kept,
        adapter="adalora",
        merges=True,
    ),
    "increlora": Method(
        "AdamW on adapters, the most important of which get further ranks",
        _increlora,
        uses=("lr_scale",),
        options=IncreLoRAOptions,
        maintenance=_count_open,
        adapter="increlora",
        merges=True,
    ),
    "sora": Method(
        "AdamW on adapters with a gate for each rank, made sparse by a soft threshold",
        _sora,
        uses=("lr_scale",),
        options=SoRAOptions,
        maintenance=count_live,
        adapter="gated",
    ),
    "codyra": Method(
        "SoRA for tasks in sequence: a threshold that grows, and adapters merged after each task",
        _codyra,
        uses=("lr_scale",),
        options=CoDyRAOptions,
        maintenance=count_live,
        adapter="gated",
        merges=True,
    ),
    "trp": Method(
        "AdamW on dense projections, truncated to their leading singular values every K-th step",
        _trp,
        uses=("exact_every", "lr_scale"),
        options=TRPOptions,
        periodic=True,
        maintenance=_mean_rank,
    ),
}
