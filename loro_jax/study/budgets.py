"""Budgets of a comparison: what its arms have in common, and what follows for each of them.

Arms have equal tokens (nothing changes), equal operations or equal time (their steps follow), or
equal memory (their ranks follow).
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence

from loro_jax.errors import TrainingError
from loro_jax.planning.flops import flops_per_token
from loro_jax.planning.measured_step import prepare
from loro_jax.planning.memory_table import held_by
from loro_jax.planning.timing import time_in_turns
from loro_jax.study.report import Arm, Run, config_of
from loro_jax.tables import replacing
from loro_jax.training.config import Config
from loro_jax.training.threads import lapack_by_one_thread

BUDGETS = ("tokens", "flops", "seconds", "memory")

# Timings of each arm's step; their median counts.
_ROUNDS = 9


def with_budget(budget: str, base: Config, arms: Sequence[Arm], out: str) -> list[Arm]:
    """Gives the arms one of :data:`BUDGETS`, that of the first arm's run.

    Args:
        budget: "tokens", "flops", "seconds" or "memory".
        base: config shared by all arms; its steps are those of the first arm.
        arms: the arms; steps or ranks that one of them sets itself are replaced.
        out: directory of the comparison, where measured times are kept for the next call.

    Returns:
        The arms, with fields of their own.

    Raises:
        TrainingError: for a tokenizer that can't be read, times in ``out`` that don't belong to
            the arms, or an arm that does not fit the first one's memory.
    """
    if budget == "flops":
        return with_equal_compute(base, arms)
    if budget == "seconds":
        costs = relative_seconds(base, arms, pathlib.Path(out) / "seconds.json")
        return _with_steps(base, arms, costs)
    if budget == "memory":
        return with_equal_memory(base, arms)
    return list(arms)


def with_equal_compute(base: Config, arms: Sequence[Arm]) -> list[Arm]:
    """Gives every arm as many steps as the operations of the first arm's run pay for.

    Operations are those of the model, forward and backward (:func:`flops_per_token`), on the tokens
    of the arm's batches; those of the optimizer are not counted. Warm-up and evaluations keep their
    places relative to the run, and the number of steps is rounded to a whole number of evaluations.

    Args:
        base: config shared by all arms; its steps are those of the first arm.
        arms: the arms; steps that one of them sets itself are replaced.

    Returns:
        The arms, with ``steps``, ``warmup_steps`` and ``eval_every`` of their own.

    Raises:
        TrainingError: for a tokenizer that can't be read.
    """
    configs = {arm.name: _config(base, arm) for arm in arms}
    costs = {
        name: flops_per_token(config) * config.batch_size * config.sequence_length
        for name, config in configs.items()
    }
    return _with_steps(base, arms, costs)


@lapack_by_one_thread()  # as train.py does
def relative_seconds(base: Config, arms: Sequence[Arm], path: pathlib.Path) -> dict[str, float]:
    """Measures the time of every arm's step, as a multiple of the first arm's.

    Steps are taken in turns, with random ids, by the devices that are here, where the states of all
    arms have to fit; nothing else should run. The median step counts, so that exact steps do unless
    they are rare. What was measured before is kept: a comparison that is resumed, shared by two
    processes, or run again with another arm has the steps that it had.

    Args:
        base: config shared by all arms.
        arms: the arms.
        path: JSON file of the times by the arm's name, written here.

    Returns:
        Times by name; that of the first arm is 1.

    Raises:
        TrainingError: for a file whose times are not multiples of the first arm's.
    """
    first = arms[0].name
    known = _known_seconds(path, first)
    missing = [arm for arm in arms if arm.name not in known]
    if not missing:
        return known
    timed = [arms[0], *(arm for arm in missing if arm.name != first)]
    steps = {arm.name: prepare(_config(base, arm)).step for arm in timed}
    seconds = time_in_turns(steps, _ROUNDS)
    known |= {name: time / seconds[first] for name, time in seconds.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    return known


def _known_seconds(path: pathlib.Path, first: str) -> dict[str, float]:
    if not path.exists():
        return {}
    try:
        known = {str(name): float(time) for name, time in json.loads(path.read_text()).items()}
    except (ValueError, AttributeError, TypeError):
        known = {}
    if known.get(first) != 1 or not all(time > 0 for time in known.values()):
        raise TrainingError(
            f"{path}: expected times of steps as multiples of the first arm's, {first!r}. Use the "
            "first arm that they were measured with, another --out, or remove the file."
        )
    return known


def with_equal_memory(base: Config, arms: Sequence[Arm]) -> list[Arm]:
    """Gives every arm with a rank the largest one that fits the memory of the first arm.

    Weights, gradients and the optimizer's state are counted (:func:`held_by`), activations are not.
    Arms that have no rank stay as they are.

    Args:
        base: config shared by all arms.
        arms: the arms; ``model.rank`` of all but the first is replaced.

    Returns:
        The arms, with a ``model.rank`` of their own.

    Raises:
        TrainingError: for an arm that does not fit, even with rank 1.
    """
    budget = _bytes(base, arms[0])
    equal = [arms[0]]
    for arm in arms[1:]:
        least = _bytes(base, _with_rank(arm, 1))
        if least > budget:
            raise TrainingError(
                f"--equal=memory: {arm.name!r} takes {least / 1e6:.4g} MB without activations, "
                f"even with rank 1; expected at most the {budget / 1e6:.4g} MB of the first arm, "
                f"{arms[0].name!r}."
            )
        # Memory does not fall as the rank grows: `fits` is the largest rank known to fit.
        fits, most, above = 1, least, base.model.hidden_size + 1
        while above - fits > 1:
            rank = (fits + above) // 2
            held = _bytes(base, _with_rank(arm, rank))
            if held <= budget:
                fits, most = rank, held
            else:
                above = rank
        # Without a rank all are the same.
        equal.append(_with_rank(arm, fits) if most > least else arm)
    return equal


def _with_rank(arm: Arm, rank: int) -> Arm:
    return arm._replace(changes=(*arm.changes, ("model.rank", rank)))


def _bytes(base: Config, arm: Arm) -> float:
    """Returns the bytes that an arm holds in training; infinity for a rank that is too large."""
    config = _config(base, arm)
    try:
        config.validate()
    except TrainingError:
        if dict(arm.changes).get("model.rank", 1) == 1:
            raise
        return float("inf")
    held = held_by(config)
    return held.weights + held.optimizer + held.gradients


def _config(base: Config, arm: Arm) -> Config:
    return config_of(base, Run(arm, base.learning_rate, base.seed))


def _with_steps(base: Config, arms: Sequence[Arm], costs: Mapping[str, float]) -> list[Arm]:
    """Gives each arm the steps that the first one's run pays for, at the costs of a step."""
    evaluations = max(1, round(base.steps / base.eval_every))
    equal = []
    for arm in arms:
        steps = base.steps * costs[arms[0].name] / costs[arm.name]
        every = max(1, round(steps / evaluations))
        warmup = round(base.warmup_steps * every * evaluations / base.steps)
        own = (
            ("steps", every * evaluations),
            ("warmup_steps", warmup),
            ("eval_every", every),
        )
        equal.append(arm._replace(changes=(*arm.changes, *own)))
    return equal
