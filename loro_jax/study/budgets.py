"""Budgets of a comparison: equal tokens, or equal compute with as many steps as it pays for."""

from __future__ import annotations

from collections.abc import Sequence

from loro_jax.planning.flops import flops_per_token
from loro_jax.study.report import Arm, Run, config_of
from loro_jax.training.config import Config

BUDGETS = ("tokens", "flops")


def with_equal_compute(base: Config, arms: Sequence[Arm]) -> list[Arm]:
    """Gives every arm as many steps as the operations of the first arm's run pay for.

    Operations are those of the model, forward and backward (:func:`flops_per_token`); those of the
    optimizer are not counted. Warm-up and evaluations keep their places relative to the run, and
    the number of steps is rounded to a whole number of evaluations.

    Args:
        base: config shared by all arms; its steps are those of the first arm.
        arms: the arms; steps that one of them sets itself are replaced.

    Returns:
        The arms, with ``steps``, ``warmup_steps`` and ``eval_every`` of their own.

    Raises:
        TrainingError: for a tokenizer that can't be read.
    """

    def cost(arm: Arm) -> float:
        return flops_per_token(config_of(base, Run(arm, base.learning_rate, base.seed)))

    evaluations = max(1, round(base.steps / base.eval_every))
    costs = [cost(arm) for arm in arms]
    equal = []
    for arm, of_arm in zip(arms, costs, strict=True):
        steps = base.steps * costs[0] / of_arm
        every = max(1, round(steps / evaluations))
        warmup = round(base.warmup_steps * every * evaluations / base.steps)
        own = (
            ("steps", every * evaluations),
            ("warmup_steps", warmup),
            ("eval_every", every),
        )
        equal.append(arm._replace(changes=(*arm.changes, *own)))
    return equal
