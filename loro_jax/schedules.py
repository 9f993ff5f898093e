"""The paper's learning-rate schedules: warm-up, cosine, and a re-warm-up after exact steps.

All are Optax schedules: functions from the step (from 0) to the learning rate.
"""

from __future__ import annotations

import numbers
from typing import Any

import jax
import jax.numpy as jnp
import optax

# Steps are counted in int32: a period beyond the largest count never comes due.
LAST_STEP = 2**31 - 1


def is_never(every: Any) -> bool:
    """Returns whether a number of steps is beyond the largest count."""
    return isinstance(every, numbers.Integral) and int(every) >= LAST_STEP


def value_at(value: Any, step: Any) -> Any:
    """Returns a number, or a schedule's value at a step counted from 0.

    Example:
        >>> value_at(0.1, 3), value_at(lambda step: 2 * step, 3)
        (0.1, 6)
    """
    return value(step) if callable(value) else value


def countable(steps: int) -> int:
    """Limits a number of steps to the largest count.

    Example:
        >>> countable(10**10) == countable(10**12) == 2**31 - 1, countable(500)
        (True, 500)
    """
    return min(steps, LAST_STEP)


def warmup_cosine(
    peak: float,
    total_steps: int,
    warmup_steps: int,
    initial_ratio: float = 0.1,
    final_ratio: float = 0.1,
) -> optax.Schedule:
    """Returns a schedule of linear warm-up followed by cosine decay.

    The rate rises from ``initial_ratio * peak`` to ``peak`` over the warm-up, then follows half a
    cosine down to ``final_ratio * peak`` at ``total_steps``. The paper says that the warm-up
    starts at zero; the authors' code, and the default here, start it at a tenth of the peak.

    Args:
        peak: highest learning rate.
        total_steps: length of the run.
        warmup_steps: length of the warm-up, part of ``total_steps``.
        initial_ratio: ratio of the first rate to the peak.
        final_ratio: ratio of the last rate to the peak.

    Returns:
        A schedule.

    Raises:
        ValueError: if the warm-up is negative or longer than the run.

    Example:
        >>> schedule = warmup_cosine(1.0, total_steps=110, warmup_steps=10)
        >>> [round(float(schedule(step)), 3) for step in (0, 10, 60, 110)]
        [0.1, 1.0, 0.55, 0.1]
    """
    _check_warmup("warmup_cosine", total_steps, warmup_steps)
    # Optax requires at least one step, even if the whole run is a warm-up.
    decay_steps: float = max(total_steps - warmup_steps, 1)
    if is_never(total_steps):  # int32 would overflow
        decay_steps, warmup_steps = float(decay_steps), float(warmup_steps)  # type: ignore[assignment]
    decay = optax.cosine_decay_schedule(peak, decay_steps, alpha=final_ratio)
    return _after_warmup(decay, peak, warmup_steps, initial_ratio)


def warmup_linear(
    peak: float,
    total_steps: int,
    warmup_steps: int,
    initial_ratio: float = 0.0,
    final_ratio: float = 0.0,
) -> optax.Schedule:
    """Returns a schedule of linear warm-up followed by linear decay.

    Args:
        peak: highest learning rate.
        total_steps: length of the run.
        warmup_steps: length of the warm-up, part of ``total_steps``.
        initial_ratio: ratio of the first rate to the peak.
        final_ratio: ratio of the last rate to the peak.

    Returns:
        A schedule.

    Raises:
        ValueError: if the warm-up is negative or longer than the run.

    Example:
        >>> schedule = warmup_linear(1.0, total_steps=110, warmup_steps=10)
        >>> [round(float(schedule(step)), 3) for step in (0, 5, 10, 60, 110)]
        [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    _check_warmup("warmup_linear", total_steps, warmup_steps)
    decay = optax.linear_schedule(peak, final_ratio * peak, max(total_steps - warmup_steps, 1))
    return _after_warmup(decay, peak, warmup_steps, initial_ratio)


def _check_warmup(name: str, total_steps: int, warmup_steps: int) -> None:
    if not 0 <= warmup_steps <= total_steps:
        raise ValueError(
            f"{name}: warmup_steps must be between 0 and total_steps = {total_steps}, but is "
            f"{warmup_steps}."
        )


def _after_warmup(
    decay: optax.Schedule, peak: float, warmup_steps: int, initial_ratio: float
) -> optax.Schedule:
    """Returns a decay after a linear warm-up."""
    if warmup_steps == 0:
        return decay
    # The joined decay counts its steps from the end of the warm-up. (In the authors' code the
    # cosine is shifted by the length of the warm-up.)
    warmup = optax.linear_schedule(initial_ratio * peak, peak, warmup_steps)
    return optax.join_schedules([warmup, decay], [warmup_steps])


def with_restarts(
    schedule: optax.ScalarOrSchedule,
    every: int,
    warmup_steps: int = 5,
) -> optax.Schedule:
    """Adds a re-warm-up after each exact step to a schedule.

    The exact step rotates the factors, and Adam restarts after it: its first directions are close
    to the signs of a single gradient. The rate therefore restarts at zero on the step after an
    exact one and rises linearly over ``warmup_steps`` back to the schedule. Steps before the first
    exact step are not affected.

    Args:
        schedule: a learning rate or a schedule.
        every: K, the distance between exact steps: step t is exact when ``(t + 1) % K == 0``.
        warmup_steps: length of the re-warm-up; 0 turns it off.

    Returns:
        A schedule.

    Raises:
        ValueError: if ``every`` is below 1 or ``warmup_steps`` negative.

    Example:
        >>> schedule = with_restarts(1.0, every=100, warmup_steps=5)
        >>> [round(float(schedule(step)), 3) for step in (0, 99, 100, 101, 104, 105)]
        [1.0, 1.0, 0.0, 0.2, 0.8, 1.0]
    """
    if every < 1 or warmup_steps < 0:
        raise ValueError(
            f"with_restarts: expected every >= 1 and warmup_steps >= 0, but every is {every} and "
            f"warmup_steps is {warmup_steps}."
        )

    def restarted(step: jax.typing.ArrayLike) -> jax.Array:
        base = value_at(schedule, step)
        if is_never(every):
            return jnp.asarray(base)
        # Step t is exact when t + 1 is a multiple of K, so the step after it is a multiple itself:
        # there the count starts from 0, and with it the rate.
        exact_steps = jnp.asarray(step) // every
        since_exact = jnp.asarray(step) - exact_steps * every
        factor = jnp.minimum(since_exact / float(max(warmup_steps, 1)), 1.0)
        warming = (exact_steps > 0) & (warmup_steps > 0)
        return jnp.where(warming, factor, 1.0) * base

    return restarted
