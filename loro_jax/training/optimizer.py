"""From a config to an Optax optimizer."""

from __future__ import annotations

import jax
import optax

from loro_jax.loro import loro
from loro_jax.schedules import warmup_cosine, with_restarts
from loro_jax.training.config import Config


def make_schedule(config: Config) -> optax.Schedule:
    """The learning rate of a run: warm-up, cosine, and a re-warm-up after LORO's exact steps."""
    schedule = warmup_cosine(
        config.learning_rate,
        config.steps,
        config.warmup_steps,
        config.initial_lr_ratio,
        config.final_lr_ratio,
    )
    if config.method != "loro":
        return schedule
    return with_restarts(schedule, config.exact_every, config.restart_warmup_steps)


def make_optimizer(
    config: Config, mesh: jax.sharding.Mesh | None = None
) -> optax.GradientTransformationExtraArgs:
    """The optimizer of a run's method, its exact steps shared by the devices of a mesh.

    * loro: exact step every ``exact_every`` steps, refresh, scaled approximate steps;
    * lowrank: Adam on the factors as on all other leaves;
    * full: the same Adam on the dense twin.

    Gradient clipping is not part of it: the step needs the gradient's norm for its metrics too.
    """
    is_loro = config.method == "loro"
    return loro(
        make_schedule(config),
        exact_every=config.exact_every if is_loro else None,
        refresh=config.refresh_choice if is_loro else None,
        lr_scale=config.lr_scale if is_loro else 1.0,
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        max_move=config.max_move if config.max_move > 0 else None,
        damping=config.damping if config.damping > 0 else None,
        exact_method=config.exact_method,
        require_pairs=config.method != "full",
        mesh=mesh,
    )
