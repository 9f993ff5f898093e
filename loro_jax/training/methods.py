"""From a config to what trains it: the optimizer of each method, and what else it does to a model.

The projections that a method trains are named in :data:`loro_jax.training.config.METHODS`; all else
about it is here. Adam is the textbook's, with bias correction, but for LORO's, which is the
authors'.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import optax

from loro_jax.descent import riemannian_descent
from loro_jax.directions.orthogonal import orthogonal
from loro_jax.loro import loro
from loro_jax.peers.adarankgrad import adarankgrad
from loro_jax.peers.fira import fira
from loro_jax.peers.galore import galore
from loro_jax.peers.muon import muon
from loro_jax.peers.preconditioned import preconditioned
from loro_jax.peers.relora import jagged_schedule
from loro_jax.peers.restarts import lowrank_restarts, svd_projection
from loro_jax.peers.spectron import spectron
from loro_jax.schedules import warmup_cosine, with_restarts
from loro_jax.training.adapters import (
    Maintenance,
    relora_maintenance,
    switchlora_maintenance,
)
from loro_jax.training.config import METHODS, Config

Optimizer: TypeAlias = optax.GradientTransformationExtraArgs

# Methods whose learning rate starts again behind every K-th step.
_RESTARTED = ("loro", "lowrank_restarts", "svd_projection", "preconditioned_exact")

# Of LORO's factors by orthogonalised momentum, on the learning rate of the rest: a step of 0.024
# in the product's spectral norm where that is 0.01, the best of those tried at three ranks and two
# widths (README, "What the study says so far").
_ORTHOGONAL_SCALE = 2.4
# Of dense projections by Muon: the better of 0.012 and 0.024 at 2.56M tokens.
_MUON_SCALE = 1.2


def make_schedule(config: Config) -> optax.Schedule:
    """The learning rate of a run: warm-up, cosine, and a re-warm-up where a method restarts."""
    schedule = warmup_cosine(
        config.learning_rate,
        config.steps,
        config.warmup_steps,
        config.initial_lr_ratio,
        config.final_lr_ratio,
    )
    if config.method == "relora":
        return jagged_schedule(schedule, config.exact_every, config.restart_warmup_steps)
    if config.method not in _RESTARTED or not config.exact_every:
        return schedule
    return with_restarts(schedule, config.exact_every, config.restart_warmup_steps)


def make_optimizer(config: Config, mesh: Any | None = None) -> Optimizer:
    """The optimizer of a run's method, its exact steps shared by the devices of a mesh.

    ``mesh`` is that, or a tree of the parameters' shardings on it.

    Gradient clipping is not part of it: the step needs the gradient's norm for its metrics too.
    """
    return _OPTIMIZERS.get(config.method, _adam)(config, mesh)


def _adam(config: Config, mesh: Any) -> Optimizer:
    """AdamW on all that is trained; the factors may have a learning rate of their own.

    So may the projections of a dense model.
    """
    everything = riemannian_descent(
        make_schedule(config),
        _textbook_adam(config),
        _no_exact_step,
        exact_every=None,
        refresh=None,
        lr_scale=_scale_or_one(config),
        weight_decay=config.weight_decay,
        require_pairs=False,
        mesh=mesh,
    )
    if config.lr_scale is None or METHODS[config.method] is not None:
        return everything
    return optax.chain(everything, optax.masked(optax.scale(config.lr_scale), _projections))


def _full(config: Config, mesh: Any) -> Optimizer:
    """The dense twin, by Adam or by Muon."""
    if config.direction == "adam":
        return _adam(config, mesh)
    return muon(
        make_schedule(config),
        projected=_projections,
        lr_scale=_MUON_SCALE if config.lr_scale is None else config.lr_scale,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
    )


def _textbook_adam(config: Config) -> optax.GradientTransformation:
    return optax.scale_by_adam(config.b1, config.b2, config.eps)


def _scale_or_one(config: Config) -> float:
    return 1.0 if config.lr_scale is None else config.lr_scale


def _no_exact_step(*_: Any) -> Any:
    raise AssertionError("there are no exact steps")


def _loro(config: Config, mesh: Any) -> Optimizer:
    direction, scale = None, config.lr_scale
    if config.direction != "adam":
        direction = orthogonal(config.momentum)
        scale = _ORTHOGONAL_SCALE if scale is None else scale
    return loro(
        make_schedule(config),
        direction=direction,
        exact_every=config.exact_every or None,
        refresh=config.refresh_choice,
        lr_scale=scale,
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        max_move=config.max_move or None,
        damping=config.damping or None,
        exact_method=config.exact_method,
        basis=config.basis,
        mesh=mesh,
    )


def _lowrank_restarts(config: Config, mesh: Any) -> Optimizer:
    return _balanced(lowrank_restarts, config, mesh, _scale_or_one(config))


def _svd_projection(config: Config, mesh: Any) -> Optimizer:
    return _balanced(svd_projection, config, mesh, config.lr_scale)


def _balanced(
    method: Callable[..., Optimizer], config: Config, mesh: Any, lr_scale: float | None
) -> Optimizer:
    return method(
        make_schedule(config),
        every=config.exact_every,
        direction=_textbook_adam(config),
        lr_scale=lr_scale,
        weight_decay=config.weight_decay,
        mesh=mesh,
    )


def _preconditioned(config: Config, mesh: Any) -> Optimizer:
    exact = config.method == "preconditioned_exact"
    return preconditioned(
        make_schedule(config),
        exact_every=config.exact_every if exact else None,
        lr_scale=_scale_or_one(config),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        exact_method=config.exact_method,
        max_move=config.max_move or None,
        mesh=mesh,
    )


def _spectron(config: Config, mesh: Any) -> Optimizer:
    del mesh
    schedule = make_schedule(config)
    scale = _scale_or_one(config)
    return spectron(
        lambda step: scale * schedule(step),
        weight_decay=config.weight_decay,
        regular_learning_rate=schedule,
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
    )


def _projected_gradient(method: Callable[..., Optimizer]) -> Callable[[Config, Any], Optimizer]:
    def make(config: Config, mesh: Any) -> Optimizer:
        del mesh
        return method(
            make_schedule(config),
            config.model.rank,
            projected=_projections,
            update_every=config.exact_every,
            scale=config.projection_scale,
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
        )

    return make


def _projections(params: Any) -> Any:
    """Which leaves are projections of the blocks; embedding, head and norms are not."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[0].key == "blocks" and path[-1].key == "W", params
    )


_OPTIMIZERS: dict[str, Callable[[Config, Any], Optimizer]] = {
    "loro": _loro,
    "full": _full,
    "lowrank_restarts": _lowrank_restarts,
    "svd_projection": _svd_projection,
    "preconditioned": _preconditioned,
    "preconditioned_exact": _preconditioned,
    "spectron": _spectron,
    "galore": _projected_gradient(galore),
    "fira": _projected_gradient(fira),
    "adarankgrad": _projected_gradient(adarankgrad),
}


def make_maintenance(config: Config) -> Maintenance:
    """What a method does to the model around the optimizer's step; nothing, mostly."""
    if config.method == "relora":
        return relora_maintenance(config)
    if config.method == "switchlora":
        return switchlora_maintenance(config)
    return Maintenance()
