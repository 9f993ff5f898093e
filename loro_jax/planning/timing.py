"""Timing of candidates in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax


def time_in_turns(
    candidates: dict[str, Callable[[], Any]], rounds: int, pause: float = 0.0
) -> dict[str, float]:
    """Returns the median seconds of each candidate, called in turns after a warm-up call.

    Args:
        candidates: functions by name; timing includes the computation of returned JAX arrays.
        rounds: number of timings of each.
        pause: seconds to wait before each call, until the previous one's threads stop spinning.

    Returns:
        Median seconds by name.

    Example:
        >>> sorted(time_in_turns({"a": lambda: 1, "b": lambda: 2}, rounds=3))
        ['a', 'b']
    """
    seconds = rounds_in_turns(candidates, rounds, pause)
    return {name: statistics.median(times) for name, times in seconds.items()}


def rounds_in_turns(
    candidates: dict[str, Callable[[], Any]], rounds: int, pause: float = 0.0
) -> dict[str, list[float]]:
    """Returns the seconds of each candidate in every round, for ratios within rounds.

    Args:
        candidates: as for :func:`time_in_turns`.
        rounds: number of timings of each.
        pause: as for :func:`time_in_turns`.

    Returns:
        Seconds by name, in the order of the rounds.

    Example:
        >>> {name: len(times) for name, times in rounds_in_turns({"a": lambda: 1}, 3).items()}
        {'a': 3}
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for candidate in candidates.values():
        # Compilation, and the first touch of all memory, are not timed.
        jax.block_until_ready(candidate())
    for _ in range(rounds):
        # In turns, so that what slows the machine for a while slows all candidates.
        for name, candidate in candidates.items():
            time.sleep(pause)
            started = time.perf_counter()
            jax.block_until_ready(candidate())
            seconds[name].append(time.perf_counter() - started)
    return seconds
