"""ReLoRA: every few thousand steps, s B A is merged into W0, and B and A are reinitialised.

The weight is W0 + s B A with a frozen W0; each restart adds a matrix of rank r to W0, so the sum
of the updates has a rank above r. At a restart most of the optimizer's moments of B and A are
zeroed, since they belong to the old directions (Adam's step count continues), and the learning rate
warms up from zero.

The method has a warm start: the authors first train all of W (5,000 of 20,000 steps, for the LLaMA
models), then freeze it as W0 and continue with B and A at about twice the learning rate,
s = 32 / r, r = 128 and a restart every 5,000 steps. The functions here are independent of the warm
start, but restarts and schedule must count the same steps.

Source: Lialin, Muckatira, Shivagunde, Rumshisky, "ReLoRA: High-Rank Training Through Low-Rank
Updates", ICLR 2024, arXiv 2307.05695 (section 3, algorithm 1 and figure 2), and the authors' code
(github.com/Guitaricet/relora).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from loro_jax.linalg.precision import at_least_float32
from loro_jax.lowrank import check_factors
from loro_jax.schedules import countable, with_restarts

Array = jax.Array
Pair = tuple[Array, Array]


def merge_and_restart(
    key: Array,
    W0: Array,
    B: Array,
    A: Array,
    moments: tuple[Pair, ...],
    *,
    scale: float,
    keep: float = 0.001,
    pruning: str = "random",
) -> tuple[Array, Array, Array, tuple[Pair, ...]]:
    """Merges s B A into W0, zeroes B, reinitialises A and prunes the moments.

    A is uniform between -1 / sqrt(n) and 1 / sqrt(n): Kaiming with a leaky slope of sqrt(5), as in
    a new linear layer of PyTorch and in LoRA.

    Moments are pruned separately for each matrix, and first moments separately from second ones.
    The authors' script prunes at random and keeps 0.1 % by default, also for the LLaMA models; the
    paper describes pruning 99 % by magnitude (``pruning="magnitude", keep=0.01``), and the script's
    configuration for 1B parameters keeps the largest 10 %. Here exactly ``round(keep * size)``
    entries of a matrix are kept, in the script this number on average.

    Args:
        key: JAX random key.
        W0: frozen weight (..., m, n); leading axes are layers.
        B: (..., m, r).
        A: (..., r, n).
        moments: pairs (for_B, for_A), as ``((mu_B, mu_A), (nu_B, nu_A))``.
        scale: s.
        keep: share of the moments to keep, from 0 to 1.
        pruning: "random", or "magnitude" to keep the largest entries.

    Returns:
        W0, B, A and moments, in the shapes and dtypes of the input. The product is formed in
        float32 or wider; a W0 in bfloat16 rounds the sum.

    Raises:
        ValueError: for mismatched shapes, or invalid ``keep`` or ``pruning``.

    Example:
        >>> B, A, W0 = jnp.ones((4, 2)), jnp.ones((2, 3)), jnp.zeros((4, 3))
        >>> W1, B1, A1, ((mu_B, mu_A),) = merge_and_restart(
        ...     jax.random.key(0), W0, B, A, ((B, A),), scale=0.5, keep=0.25)
        >>> bool(jnp.allclose(W1 + 0.5 * B1 @ A1, W0 + 0.5 * B @ A))
        True
        >>> int(mu_B.sum()), int(mu_A.sum())
        (2, 2)

    Source: arXiv 2307.05695, algorithm 1.
    """
    check_factors(B, A, "merge_and_restart")
    if W0.shape != (*B.shape[:-1], A.shape[-1]):
        raise ValueError(
            f"merge_and_restart: expected W0 of shape {(*B.shape[:-1], A.shape[-1])}, the shape of "
            f"B A, but it has shape {W0.shape}."
        )
    if not 0 <= keep <= 1 or pruning not in ("random", "magnitude"):
        raise ValueError(
            f"merge_and_restart: expected keep between 0 and 1 and pruning 'random' or "
            f"'magnitude', but keep is {keep} and pruning is {pruning!r}."
        )
    # Algorithm 1: W0 <- W0 + s B A. In bfloat16 small products would vanish in the sum.
    wide = at_least_float32(jnp.result_type(W0, B, A))
    product = jnp.matmul(B.astype(wide), A.astype(wide), precision="highest")
    merged = (W0.astype(wide) + scale * product).astype(W0.dtype)

    key_A, key_prune = jax.random.split(key)
    pruned = []
    for i, pair in enumerate(moments):
        # A key for each moment and side, so that they are pruned independently.
        keys = jax.random.split(jax.random.fold_in(key_prune, i))
        pruned.append(
            (_prune(keys[0], pair[0], keep, pruning), _prune(keys[1], pair[1], keep, pruning))
        )
    # B = 0: the function after a restart is that before it, whatever the new A.
    return merged, jnp.zeros_like(B), _kaiming_uniform(key_A, A), tuple(pruned)


def jagged_schedule(
    schedule: optax.ScalarOrSchedule, every: int, warmup_steps: int = 100
) -> optax.Schedule:
    """Adds a re-warm-up from zero at every restart to a schedule (in the paper a cosine).

    From step ``every`` on, each period starts with a linear warm-up from zero to the value that the
    schedule has at its end, ``warmup_steps`` later (50 to 100 in the paper). It differs from
    :func:`loro_jax.with_restarts` in the target: there the rate is a fraction of the schedule's
    current value, which decays meanwhile. As there, merge after step t if ``(t + 1) % every == 0``,
    so that the first step with the new factors has rate zero. (The authors' script merges after
    that idle step.)

    Args:
        schedule: learning rate or schedule, including the first warm-up.
        every: T, the distance between restarts.
        warmup_steps: length of the re-warm-up; 0 turns it off.

    Returns:
        A schedule.

    Raises:
        ValueError: if ``every`` is below 1 or ``warmup_steps`` is not between 0 and ``every``.

    Example:
        >>> schedule = jagged_schedule(optax.linear_schedule(1.0, 0.0, 1_000), 500, 100)
        >>> [round(float(schedule(step)), 3) for step in (499, 500, 550, 600, 601)]
        [0.501, 0.0, 0.2, 0.4, 0.399]

    Source: arXiv 2307.05695, figure 2; the target of the warm-up is that of the authors' code.
    """
    if every < 1 or not 0 <= warmup_steps <= every:
        raise ValueError(
            f"jagged_schedule: expected every >= 1 and warmup_steps between 0 and every, but every "
            f"is {every} and warmup_steps is {warmup_steps}."
        )

    period = countable(every)

    def target(step: jax.typing.ArrayLike) -> jax.typing.ArrayLike:
        if not callable(schedule):
            return schedule
        # During a re-warm-up, the schedule's value at its end: the rate is then linear up to it.
        left = jnp.maximum(countable(warmup_steps) - jnp.asarray(step) % period, 0)
        return schedule(jnp.where(jnp.asarray(step) >= period, step + left, step))

    # The linear factor is that of with_restarts; only what it multiplies differs.
    return with_restarts(target, every, warmup_steps)


def _kaiming_uniform(key: Array, A: Array) -> Array:
    """Draws an array like A (..., r, n), uniform within 1 / sqrt(n)."""
    bound = A.shape[-1] ** -0.5
    wide = at_least_float32(A.dtype)
    return jax.random.uniform(key, A.shape, wide, minval=-bound, maxval=bound).astype(A.dtype)


def _prune(key: Array, moment: Array, keep: float, pruning: str) -> Array:
    """Zeroes all but ``round(keep * size)`` entries of each matrix."""
    flat = moment.reshape(*moment.shape[:-2], -1)
    score = jnp.abs(flat) if pruning == "magnitude" else jax.random.uniform(key, flat.shape)
    # Indices of the largest scores instead of a threshold, which equal entries (frequent in
    # bfloat16 and in zero moments) would all pass or all fail.
    _, survivors = jax.lax.top_k(score, round(keep * flat.shape[-1]))
    kept = jnp.take_along_axis(flat, survivors, axis=-1)
    pruned = jnp.put_along_axis(jnp.zeros_like(flat), survivors, kept, axis=-1, inplace=False)
    return pruned.reshape(moment.shape)
