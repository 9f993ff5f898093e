"""From the fast methods of the exact step down to the reference, under jit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from loro_jax.batching import one_by_one
from loro_jax.retractions.gram import gram_step
from loro_jax.retractions.graph import (
    NewSpace,
    balanced_factors,
    graph_step,
    new_space,
    principal_axes,
)
from loro_jax.retractions.reference import svd_step
from loro_jax.retractions.step import ExactStep, StepSize

Array = jax.Array

Rungs = tuple[Callable[..., ExactStep], ...]

# The methods by name, each with those that a pair goes through until one trusts its result. Behind
# them all comes the reference.
_RUNGS: dict[str, Rungs] = {
    "graph": (graph_step, gram_step),
    "gram": (gram_step,),
    "svd": (),
}

METHODS = tuple(_RUNGS)


def check_method(method: str, where: str) -> None:
    """Raises ValueError unless ``method`` names an exact step."""
    if method not in METHODS:
        raise ValueError(f"{where}: the method must be one of {METHODS}, but is {method!r}.")


def retract(method: str, B: Array, A: Array, dB: Array, dA: Array, size: StepSize) -> ExactStep:
    """Exact steps of a batch of pairs; ``ok`` says which the named method did by itself.

    Args:
        method: "graph", "gram" or "svd".
        B: (N, m, r).
        A: (N, r, n).
        dB: directions of B, (N, m, r).
        dA: directions of A, (N, r, n).
        size: one step size for each pair, shapes (N,).

    Returns:
        The new factors and ``ok`` (N,).
    """
    # A loop's index does not index NumPy's arrays.
    arguments = jax.tree.map(jnp.asarray, (B, A, dB, dA, size))
    rungs = _RUNGS[method]
    if not rungs:
        return one_by_one(svd_step, 1)(*arguments)
    return jax.lax.platform_dependent(
        *arguments,
        cpu=lambda *arguments: _one_after_the_other(rungs, *arguments),
        default=lambda *arguments: _as_a_batch(rungs, *arguments),
    )


def _one_after_the_other(rungs: Rungs, *arguments: Any) -> ExactStep:
    """Pair after pair, each down to the rung that it needs."""
    if rungs[0] is not graph_step:
        return _written_over(lambda *pair: _one_pair(rungs, *pair), *arguments)
    # In phases, because each eigendecomposition wakes threads of OpenBLAS: they go on turning when
    # it is done, on the cores that the products need.
    spaces = one_by_one(new_space, 1)(*arguments)
    axes = one_by_one(principal_axes, 1)(spaces.squares)

    def finish(space: NewSpace, axes: tuple[Array, Array], *pair: Any) -> ExactStep:
        B, A, dB, dA, _ = pair
        step = balanced_factors(B, A, dB, dA, space, axes)
        return jax.lax.cond(
            step.ok, lambda: step, lambda: _one_pair(rungs[1:], *pair)._replace(ok=step.ok)
        )

    return _written_over(finish, spaces, axes, *arguments)


def _one_pair(rungs: Rungs, *arguments: Any) -> ExactStep:
    if not rungs:
        return svd_step(*arguments)
    step = rungs[0](*arguments)
    return jax.lax.cond(
        step.ok, lambda: step, lambda: _one_pair(rungs[1:], *arguments)._replace(ok=step.ok)
    )


def _written_over(fn: Callable[..., ExactStep], *batches: Any) -> ExactStep:
    """Maps over pairs; written over the old factors, so that no memory has to be filled before."""
    # Also under a vmap one after the other: there a branch is a real branch.
    fn = jax.custom_batching.sequential_vmap(fn)
    *others, B, A, dB, dA, size = batches

    def write(i: Any, new: ExactStep) -> ExactStep:
        pair = jax.tree.map(lambda x: x[i], (*others, new.B, new.A, dB, dA, size))
        return jax.tree.map(lambda batch, one: batch.at[i].set(one), new, fn(*pair))

    return jax.lax.fori_loop(0, len(B), write, ExactStep(B, A, jnp.zeros(len(B), bool)))


def _as_a_batch(rungs: Rungs, *arguments: Any) -> ExactStep:
    """All at once; as a whole down to the rung that any of the pairs needs."""
    if not rungs:
        return jax.vmap(svd_step)(*arguments)
    step = jax.vmap(rungs[0])(*arguments)
    return jax.lax.cond(
        jnp.all(step.ok), lambda: step, lambda: _mended(step, _as_a_batch(rungs[1:], *arguments))
    )


def _mended(step: ExactStep, other: ExactStep) -> ExactStep:
    """The step, with the pairs that it could not do from another."""
    fine = step.ok[:, None, None]
    return ExactStep(jnp.where(fine, step.B, other.B), jnp.where(fine, step.A, other.A), step.ok)
