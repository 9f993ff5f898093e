"""From the fast methods of the exact step down to the reference, under jit."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from loro_jax.batching import one_by_one
from loro_jax.retractions.balance import Balance, by_singular_vectors
from loro_jax.retractions.gram import gram_step
from loro_jax.retractions.graph import NewSpace, balanced_factors, graph_step, new_space
from loro_jax.retractions.reference import svd_step
from loro_jax.retractions.step import ExactStep, StepSize

Array = jax.Array

# The methods by name, each with those that a pair goes through until one trusts its result. The
# last is the reference.
_RUNGS: dict[str, tuple[Callable[..., ExactStep], ...]] = {
    "graph": (graph_step, gram_step, svd_step),
    "gram": (gram_step, svd_step),
    "svd": (svd_step,),
}

METHODS = tuple(_RUNGS)

_Rungs = Sequence[Callable[..., ExactStep]]


def check_method(method: str, where: str) -> None:
    """Raises ValueError unless ``method`` names an exact step."""
    if method not in METHODS:
        raise ValueError(f"{where}: the method must be one of {METHODS}, but is {method!r}.")


def retract(
    method: str,
    B: Array,
    A: Array,
    dB: Array,
    dA: Array,
    size: StepSize,
    basis: str = "singular",
) -> ExactStep:
    """Exact steps of a batch of pairs; ``ok`` says which the named method did by itself.

    Args:
        method: "graph", "gram" or "svd".
        B: (N, m, r).
        A: (N, r, n).
        dB: directions of B, (N, m, r).
        dA: directions of A, (N, r, n).
        size: one step size for each pair, shapes (N,).
        basis: "singular" or "nearest", of the new factors.

    Returns:
        The new factors and ``ok`` (N,).
    """
    # A loop's index does not index NumPy's arrays.
    arguments = jax.tree.map(jnp.asarray, (B, A, dB, dA, size))
    rungs = [functools.partial(step, basis=basis) for step in _RUNGS[method]]
    if method == "svd":
        return one_by_one(rungs[0], 1)(*arguments)

    def one_after_the_other(*arguments: Any) -> ExactStep:
        if method == "graph":
            return _in_phases(rungs[1:], basis, *arguments)
        return _written_over(lambda *pair: _one_pair(rungs, *pair), *arguments)

    return jax.lax.platform_dependent(
        *arguments,
        cpu=one_after_the_other,
        default=lambda *arguments: _as_a_batch(rungs, *arguments),
    )


def _one_pair(rungs: _Rungs, *arguments: Any) -> ExactStep:
    step = rungs[0](*arguments)
    if len(rungs) == 1:
        return step
    return jax.lax.cond(
        step.ok, lambda: step, lambda: _one_pair(rungs[1:], *arguments)._replace(ok=step.ok)
    )


def _in_phases(others: _Rungs, basis: str, *arguments: Any) -> ExactStep:
    """Pair after pair by the graph; the eigendecompositions of all of them in between.

    Each of those wakes threads of OpenBLAS, which go on turning when it is done, on the cores that
    the products of the next pair need.
    """
    spaces = one_by_one(functools.partial(new_space, basis=basis), 1)(*arguments)
    balances = one_by_one(by_singular_vectors, 1)(spaces.squares)

    def finish(space: NewSpace, balance: Balance, *pair: Any) -> ExactStep:
        B, A, dB, dA, _ = pair
        step = balanced_factors(B, A, dB, dA, space, balance)
        return jax.lax.cond(
            step.ok, lambda: step, lambda: _one_pair(others, *pair)._replace(ok=step.ok)
        )

    return _written_over(finish, spaces, balances, *arguments)


def _written_over(fn: Callable[..., ExactStep], *batches: Any) -> ExactStep:
    """Maps over pairs; written over the old factors, so that no memory has to be filled before."""
    # Also under a vmap one after the other: there a branch is a real branch.
    fn = jax.custom_batching.sequential_vmap(fn)
    *others, B, A, dB, dA, size = batches

    def write(i: Any, new: ExactStep) -> ExactStep:
        pair = jax.tree.map(lambda x: x[i], (*others, new.B, new.A, dB, dA, size))
        return jax.tree.map(lambda batch, one: batch.at[i].set(one), new, fn(*pair))

    return jax.lax.fori_loop(0, len(B), write, ExactStep(B, A, jnp.zeros(len(B), bool)))


def _as_a_batch(rungs: _Rungs, *arguments: Any) -> ExactStep:
    """All at once; as a whole down to the rung that any of the pairs needs."""
    step = jax.vmap(rungs[0])(*arguments)
    if len(rungs) == 1:
        return step
    return jax.lax.cond(
        jnp.all(step.ok), lambda: step, lambda: _mended(step, _as_a_batch(rungs[1:], *arguments))
    )


def _mended(step: ExactStep, other: ExactStep) -> ExactStep:
    """The step, with the pairs that it could not do from another."""
    fine = step.ok[:, None, None]
    return ExactStep(jnp.where(fine, step.B, other.B), jnp.where(fine, step.A, other.A), step.ok)
