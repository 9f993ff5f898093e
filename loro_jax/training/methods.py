"""The tables of methods and directions: adding one takes one file and one entry here.

A method needs a file with its optimizer (:mod:`loro_jax.peers`) and an entry in :data:`METHODS`,
which states its requirements and its own fields. A direction for LORO's factors needs a file
(:mod:`loro_jax.directions`) and an entry in :data:`DIRECTIONS`. A kind of projection needs a file
and an entry in :data:`loro_jax.layers.projections.PROJECTIONS`. The trainer, its config,
``--help``, the comparison and the memory table read these entries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import optax

from loro_jax.peers.relora import jagged_schedule
from loro_jax.schedules import warmup_cosine, warmup_linear, with_restarts
from loro_jax.training import adapters, optimizers, ranks, task_sequence
from loro_jax.training.registry import (
    Direction,
    Maintenance,
    Making,
    Method,
    Optimizer,
    options_of,
)

if TYPE_CHECKING:
    from loro_jax.training.config import Config

DIRECTIONS: dict[str, Direction] = {
    "adam": Direction(
        "Adam on the factors; AdamW on dense projections",
        optimizers.adam_of_loro,
        dense=optimizers.dense_adamw,
    ),
    # 2.4: a step of 0.024 in the product's spectral norm when the learning rate of the other leaves
    # is 0.01, the best value tried at three ranks and two widths.
    "orthogonal": Direction(
        "orthogonalised momentum on the factors; Muon on dense projections",
        optimizers.orthogonal_of_loro,
        options=optimizers.OrthogonalOptions,
        of_factors=("damping",),
        lr_scale=2.4,
        dense=optimizers.dense_muon,
    ),
}


def _loro(making: Making) -> Optimizer:
    return optimizers.make_loro(*_direction_of(making.config), making)


def _full(making: Making) -> Optimizer:
    direction, options = _direction_of(making.config)
    if direction.dense is None:  # the config's validate() has refused it
        raise ValueError(f"direction {making.config.direction!r} has no optimizer of dense leaves")
    return direction.dense(making, options)


def _direction_of(config: Config) -> tuple[Direction, Any]:
    direction = DIRECTIONS[config.direction]
    return direction, options_of(direction.options, config)


def _restarted(config: Config, schedule: optax.Schedule) -> optax.Schedule:
    """Returns the schedule with a re-warm-up after every K-th step."""
    if not config.exact_every:
        return schedule
    return with_restarts(schedule, config.exact_every, config.restart_warmup_steps)


def _jagged(config: Config, schedule: optax.Schedule) -> optax.Schedule:
    # In a jagged schedule the re-warm-up has to end before the next restart.
    if config.restart_warmup_steps > config.exact_every:
        raise ValueError(
            f"restart_warmup_steps must be at most exact_every = {config.exact_every} with "
            f'config.method = "{config.method}", but is {config.restart_warmup_steps}.'
        )
    return jagged_schedule(schedule, config.exact_every, config.restart_warmup_steps)


_RESTARTED = ("exact_every", "restart_warmup_steps")

METHODS: dict[str, Method] = {
    "loro": Method(
        "the paper's method: a Riemannian step of the product every K-th step",
        _loro,
        projection="low_rank",
        other_projections=("cola", "sltrain", "lost", "scaffold", "scaffold_cola"),
        uses=(
            *_RESTARTED,
            "lr_scale",
            "direction",
            "moments",
            "basis",
            "damping",
            "max_move",
            "exact_method",
        ),
        schedule=_restarted,
        adapters="pairs",
    ),
    "lowrank": Method(
        "AdamW on the factors",
        optimizers.make_lowrank,
        projection="low_rank",
        uses=("lr_scale",),
        options=optimizers.LowRankOptions,
        adapters="any",
    ),
    "lowrank_restarts": Method(
        "AdamW on the factors, which are balanced every K-th step, with moments reset",
        optimizers.make_lowrank_restarts,
        projection="low_rank",
        uses=(*_RESTARTED, "lr_scale"),
        schedule=_restarted,
        periodic=True,
        adapters="pairs",
    ),
    "svd_projection": Method(
        "LORO's approximate steps, with only its retraction every K-th step",
        optimizers.make_svd_projection,
        projection="low_rank",
        uses=(*_RESTARTED, "lr_scale"),
        schedule=_restarted,
        periodic=True,
        adapters="pairs",
    ),
    "preconditioned": Method(
        "scaled AdamW: gradients of the factors divided by the other factor's Gram matrix",
        optimizers.make_preconditioned,
        projection="low_rank",
        uses=("lr_scale",),
        options=optimizers.PreconditionedOptions,
        adapters="pairs",
    ),
    "preconditioned_exact": Method(
        "scaled AdamW with LORO's exact steps",
        optimizers.make_preconditioned_exact,
        projection="low_rank",
        uses=(*_RESTARTED, "lr_scale", "exact_method", "max_move"),
        options=optimizers.PreconditionedOptions,
        schedule=_restarted,
        periodic=True,
        adapters="pairs",
    ),
    "spectron": Method(
        "orthogonalised momentum of both factors, with a bound on the product's step",
        optimizers.make_spectron,
        projection="low_rank",
        uses=("lr_scale",),
        options=optimizers.SpectronOptions,
        adapters="pairs",
    ),
    "cola": Method(
        "AdamW on factors with an activation between them",
        optimizers.adamw,
        projection="cola",
        uses=("lr_scale",),
    ),
    "sltrain": Method(
        "AdamW on factors plus a sparse matrix",
        optimizers.adamw,
        projection="sltrain",
        uses=("lr_scale",),
    ),
    "lost": Method(
        "AdamW on factors with an activation, plus some dense columns, all from an SVD",
        optimizers.adamw,
        projection="lost",
        uses=("lr_scale",),
    ),
    "sst": Method(
        "AdamW on the singular values and, in turns, some singular vectors of each weight",
        optimizers.adamw,
        projection="sst",
        uses=(*_RESTARTED, "lr_scale"),
        schedule=_restarted,
        periodic=True,
        maintenance=adapters.sst_maintenance,
    ),
    "osft": Method(
        "AdamW on the weak singular directions of each weight; the strong ones are kept",
        optimizers.adamw,
        projection="osft",
        uses=("lr_scale",),
        options=task_sequence.OSFTOptions,
        maintenance=task_sequence.osft_maintenance,
        next_task=task_sequence.osft_next_task,
    ),
    "lora": Method(
        "AdamW on factors added to a fixed weight",
        optimizers.adamw,
        projection="lora",
        uses=("lr_scale",),
    ),
    "relora": Method(
        "LoRA whose factors are merged into the weight every K-th step",
        optimizers.adamw,
        projection="lora",
        uses=(*_RESTARTED, "lr_scale"),
        options=adapters.ReLoRAOptions,
        schedule=_jagged,
        periodic=True,
        maintenance=adapters.relora_maintenance,
    ),
    "switchlora": Method(
        "LoRA that switches some of its vectors at every step",
        optimizers.adamw,
        projection="switchlora",
        uses=("lr_scale",),
        options=adapters.SwitchLoRAOptions,
        maintenance=adapters.switchlora_maintenance,
    ),
    "galore": Method(
        "Adam on dense projections in a subspace of their gradients, renewed every K-th step",
        optimizers.make_galore,
        uses=("exact_every",),
        options=optimizers.GaLoreOptions,
        periodic=True,
    ),
    "fira": Method(
        "GaLore plus the rest of the gradient, scaled",
        optimizers.make_fira,
        uses=("exact_every",),
        options=optimizers.FiraOptions,
        periodic=True,
    ),
    "dct_adamw": Method(
        "Adam on dense projections in columns of a cosine basis, chosen anew at each step",
        optimizers.make_dct_adamw,
        options=optimizers.DCTAdamWOptions,
    ),
    "trion": Method(
        "orthogonalised momentum of dense projections in columns of a cosine basis",
        optimizers.make_trion,
        uses=("lr_scale",),
        options=optimizers.TrionOptions,
    ),
    "adarankgrad": Method(
        "GaLore with a rank that adapts to the gradient",
        optimizers.make_adarankgrad,
        uses=("exact_every",),
        options=optimizers.AdaRankGradOptions,
        periodic=True,
    ),
    "frugal": Method(
        "Adam for a share of the dense projections, renewed every K-th step; signs for the rest",
        optimizers.make_frugal,
        uses=("exact_every",),
        options=optimizers.FrugalOptions,
        periodic=True,
    ),
    "gradnormlorp": Method(
        "GaLore on the directions of rows, Adam on their magnitudes",
        optimizers.make_gradnormlorp,
        uses=("exact_every",),
        options=optimizers.GaLoreOptions,
        periodic=True,
    ),
    "coso": Method(
        "GaLore for tasks that follow each other, orthogonal to what earlier ones have used",
        optimizers.make_coso,
        uses=("exact_every",),
        options=optimizers.CoSOOptions,
        periodic=True,
        next_task=task_sequence.coso_next_task,
    ),
    "lift": Method(
        "AdamW on the entries of dense projections that are largest in a low-rank approximation",
        optimizers.make_lift,
        uses=("exact_every",),
        options=optimizers.LiftOptions,
        periodic=True,
    ),
    **ranks.METHODS,
    "full": Method(
        "the dense model, by AdamW or, with direction orthogonal, by Muon",
        _full,
        uses=("direction", "lr_scale"),
    ),
}


def make_schedule(config: Config) -> optax.Schedule:
    """Returns the learning-rate schedule of a run: warm-up, decay, and re-warm-ups if needed."""
    after_warmup = {"cosine": warmup_cosine, "linear": warmup_linear}
    schedule = after_warmup[config.decay](
        config.learning_rate,
        config.steps,
        config.warmup_steps,
        config.initial_lr_ratio,
        config.final_lr_ratio,
    )
    of_method = METHODS[config.method].schedule
    return schedule if of_method is None else of_method(config, schedule)


def make_optimizer(config: Config, mesh: Any | None = None) -> Optimizer:
    """Makes the optimizer of a run's method.

    Gradient clipping is not included, because the step needs the gradient's norm for its metrics.

    Args:
        config: the run's config.
        mesh: the devices that share the exact steps, a tree of the parameters' shardings on them,
            or None.
    """
    method = METHODS[config.method]
    options = options_of(method.options, config)
    return method.optimizer(Making(config, make_schedule(config), options, mesh))


def make_maintenance(config: Config) -> Maintenance:
    """Returns a method's changes to the model around the optimizer's step; none for most."""
    method = METHODS[config.method]
    if method.maintenance is None:
        return Maintenance()
    return method.maintenance(config, options_of(method.options, config))


def next_task(config: Config, before: Any, fresh: Any) -> tuple[Any, str]:
    """Returns the state at the beginning of a run, given that of the task before and a new one.

    The second result is a line to print, or empty.
    """
    method = METHODS[config.method]
    assert method.next_task is not None  # checked by the caller
    return method.next_task(options_of(method.options, config), before, fresh)
