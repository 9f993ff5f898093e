"""Exact steps of batches of pairs, with fallbacks from the fast methods to the reference."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from loro_jax.exact.basis import Balance, by_singular_vectors
from loro_jax.exact.gram import gram_step
from loro_jax.exact.reference import svd_step
from loro_jax.exact.step import ExactStep, StepSize
from loro_jax.exact.subspace import NewSpace, balanced_factors, graph_step, new_space
from loro_jax.linalg.batching import maps_by_a_loop, one_by_one, varying_alike

Array = jax.Array

# The methods by name, each with its fallbacks, which are tried in this order until one trusts its
# result. The last is the reference.
_FALLBACKS: dict[str, tuple[Callable[..., ExactStep], ...]] = {
    "graph": (graph_step, gram_step, svd_step),
    "gram": (gram_step, svd_step),
    "svd": (svd_step,),
}

METHODS = tuple(_FALLBACKS)

# What "auto" stands for: the fastest.
_AUTO = METHODS[0]

# CPU only: upper bound on the coefficients held at once, seven r x r matrices for each pair; pairs
# are processed in chunks below it. 128 MiB in float32, which are 18 pairs of rank 512.
COEFFICIENTS = 2**25

_Methods = Sequence[Callable[..., ExactStep]]


def check_method(method: str, where: str) -> None:
    """Raises ValueError unless ``method`` names an exact step."""
    if method not in ("auto", *METHODS):
        expected = ("auto", *METHODS)
        raise ValueError(f"{where}: the method must be one of {expected}, but is {method!r}.")


def retract(
    method: str,
    B: Array,
    A: Array,
    dB: Array,
    dA: Array,
    size: StepSize,
    basis: str = "singular",
) -> ExactStep:
    """Takes exact steps of a batch of pairs; ``ok`` is True for pairs without a fallback.

    Args:
        method: "auto" (which is "graph"), "graph", "gram" or "svd".
        B: (N, m, r).
        A: (N, r, n).
        dB: directions of B, (N, m, r).
        dA: directions of A, (N, r, n).
        size: one step size for each pair, shapes (N,).
        basis: basis of the new factors, "singular" or "nearest".

    Returns:
        The new factors and ``ok`` (N,).
    """
    if len(B) == 0:
        return _unwritten(B, A)
    # NumPy arrays can't be indexed by the traced index of a loop.
    arguments = jax.tree.map(jnp.asarray, (B, A, dB, dA, size))
    return _retract(_AUTO if method == "auto" else method, basis, *varying_alike(arguments))


# Jitted for calls outside of jit, which would otherwise trace and compile loops and branches in
# each call. The custom_jvp refuses derivatives, with a message that says what to do.
@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def _retract(method: str, basis: str, *arguments: Any) -> ExactStep:
    methods = [functools.partial(step, basis=basis) for step in _FALLBACKS[method]]
    # The reference has no fallback. (one_by_one loops on CPU and batches elsewhere.)
    if method == "svd":
        return one_by_one(methods[0], 1)(*arguments)

    def one_after_the_other(*arguments: Any) -> ExactStep:
        if method == "graph":
            return _in_phases(methods[1:], basis, *arguments)
        return _one_after_the_other(methods, *arguments)

    # On CPU LAPACK calls must not be batched (see one_by_one), and in a loop each pair takes only
    # the fallbacks that it needs. Accelerators need the parallelism of a batch.
    return jax.lax.platform_dependent(
        *arguments,
        cpu=one_after_the_other,
        default=lambda *arguments: _as_a_batch(methods, *arguments),
    )


@_retract.defjvp
def _no_derivative(method: str, basis: str, primals: Any, tangents: Any) -> Any:
    raise NotImplementedError(
        "loro: an exact step has no derivative. Differentiate through steps without exact ones "
        "(exact_every=None), or keep the step out of it by jax.lax.stop_gradient."
    )


def _one_pair(methods: _Methods, *arguments: Any) -> ExactStep:
    """Steps one pair by the first method, with the others as fallbacks."""
    step = methods[0](*arguments)
    return _or_fallback(step, methods[1:], *arguments)


def _or_fallback(step: ExactStep, fallbacks: _Methods, *arguments: Any) -> ExactStep:
    """Returns the step, or the fallbacks' step if its method does not trust it."""
    if not fallbacks:
        return step
    # `ok` stays that of the first method, because the count of fallbacks is made from it.
    return jax.lax.cond(
        step.ok, lambda: step, lambda: _one_pair(fallbacks, *arguments)._replace(ok=step.ok)
    )


def _in_phases(fallbacks: _Methods, basis: str, *arguments: Any) -> ExactStep:
    """Steps pairs in chunks, with all eigendecompositions of a chunk in one phase.

    After an eigendecomposition the threads of OpenBLAS keep spinning for a while, on the cores that
    matrix products need. In phases this happens once per chunk instead of once per pair.
    """
    B, A, dB, dA, size = arguments
    # Chunks of equal size: the largest divisor of the number of pairs within the memory bound.
    most = min(len(B), COEFFICIENTS // (7 * B.shape[-1] ** 2))
    at_a_time = max((n for n in range(1, most + 1) if len(B) % n == 0), default=1)
    # Under a vmap, too, pairs are processed one by one: a batched `cond` would run both branches.
    space_of = maps_by_a_loop(new_space)
    balance_of = maps_by_a_loop(by_singular_vectors)

    @maps_by_a_loop
    def finish(space: NewSpace, balance: Balance, *pair: Any) -> ExactStep:
        B, A, dB, dA, _ = pair
        step = balanced_factors(B, A, dB, dA, space, balance, basis)
        return _or_fallback(step, fallbacks, *pair)

    def some(k: Any, new: ExactStep) -> ExactStep:
        first = k * at_a_time

        # Factors are read from the results, where those of this chunk are still the old ones.
        def pair(i: Any, new: ExactStep) -> Any:
            return jax.tree.map(lambda x: x[first + i], (new.B, new.A, dB, dA, size))

        spaces = jax.lax.map(lambda i: space_of(*pair(i, new)), jnp.arange(at_a_time))
        balances = jax.lax.map(balance_of, spaces.squares)

        def write(i: Any, new: ExactStep) -> ExactStep:
            space, balance = jax.tree.map(lambda x: x[i], (spaces, balances))
            return _with_pair(new, first + i, finish(space, balance, *pair(i, new)))

        return jax.lax.fori_loop(0, at_a_time, write, new)

    return jax.lax.fori_loop(0, len(B) // at_a_time, some, _unwritten(B, A))


def _one_after_the_other(methods: _Methods, *arguments: Any) -> ExactStep:
    """Steps pairs one by one, each with its own fallbacks."""
    B, A, dB, dA, size = arguments
    step_of = maps_by_a_loop(functools.partial(_one_pair, methods))

    def write(i: Any, new: ExactStep) -> ExactStep:
        pair = jax.tree.map(lambda x: x[i], (new.B, new.A, dB, dA, size))
        return _with_pair(new, i, step_of(*pair))

    return jax.lax.fori_loop(0, len(B), write, _unwritten(B, A))


def _unwritten(B: Array, A: Array) -> ExactStep:
    """Returns the old factors as the initial result, which new ones overwrite in place."""
    return varying_alike(ExactStep(B, A, jnp.zeros(len(B), bool)))


def _with_pair(new: ExactStep, i: Any, one: ExactStep) -> ExactStep:
    return jax.tree.map(lambda batch, pair: batch.at[i].set(pair), new, one)


def _as_a_batch(methods: _Methods, *arguments: Any) -> ExactStep:
    """Steps all pairs at once; the whole batch takes a fallback if any of its pairs needs it."""
    step = jax.vmap(methods[0])(*arguments)
    if len(methods) == 1:
        return step

    def with_fallback() -> ExactStep:
        # Pairs that needed no fallback keep their result, whatever the rest of the batch does.
        other, fine = _as_a_batch(methods[1:], *arguments), step.ok[:, None, None]
        B, A = jnp.where(fine, step.B, other.B), jnp.where(fine, step.A, other.A)
        return ExactStep(B, A, step.ok)

    return jax.lax.cond(jnp.all(step.ok), lambda: step, with_fallback)
