"""From the fast methods of the exact step down to the reference, under jit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from loro_jax.batching import one_by_one
from loro_jax.retractions.gram import gram_step
from loro_jax.retractions.graph import graph_step
from loro_jax.retractions.reference import svd_step
from loro_jax.retractions.step import ExactStep, StepSize

Array = jax.Array

# The methods by name, each with those that a pair goes through until one trusts its result. Behind
# them all comes the reference.
_RUNGS: dict[str, tuple[Callable[..., ExactStep], ...]] = {
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

    # One pair after the other on CPU, also under a vmap: there a branch is a real branch.
    @jax.custom_batching.sequential_vmap
    def one_pair(*arguments: Any) -> ExactStep:
        def climb(rungs: tuple[Callable[..., ExactStep], ...]) -> ExactStep:
            if not rungs:
                return svd_step(*arguments)
            step = rungs[0](*arguments)
            return jax.lax.cond(step.ok, lambda: step, lambda: _not_ok(climb(rungs[1:])))

        return climb(rungs)

    def one_after_the_other(B: Array, A: Array, dB: Array, dA: Array, size: StepSize) -> ExactStep:
        # Written over the old factors, so that no memory has to be filled beforehand.
        def write(i: Any, new: ExactStep) -> ExactStep:
            pair = jax.tree.map(lambda x: x[i], (new.B, new.A, dB, dA, size))
            return jax.tree.map(lambda batch, one: batch.at[i].set(one), new, one_pair(*pair))

        return jax.lax.fori_loop(0, len(B), write, ExactStep(B, A, jnp.zeros(len(B), bool)))

    # Elsewhere the batch stays a batch, and goes on as a whole if any pair has to.
    def batch(*arguments: Any) -> ExactStep:
        def climb(rungs: tuple[Callable[..., ExactStep], ...]) -> ExactStep:
            if not rungs:
                return jax.vmap(svd_step)(*arguments)
            step = jax.vmap(rungs[0])(*arguments)
            return jax.lax.cond(
                jnp.all(step.ok), lambda: step, lambda: _mended(step, climb(rungs[1:]))
            )

        return climb(rungs)

    return jax.lax.platform_dependent(*arguments, cpu=one_after_the_other, default=batch)


def _not_ok(step: ExactStep) -> ExactStep:
    return step._replace(ok=jnp.bool_(False))


def _mended(step: ExactStep, other: ExactStep) -> ExactStep:
    """The step, with the pairs that it could not do from another."""
    fine = step.ok[:, None, None]
    return ExactStep(jnp.where(fine, step.B, other.B), jnp.where(fine, step.A, other.A), step.ok)
