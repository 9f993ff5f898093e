"""Exact steps of batches of pairs, with fallbacks from the fast methods to the reference."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from loro_jax.exact.gram import gram_step
from loro_jax.exact.phases import graph_steps, starts_of
from loro_jax.exact.reference import svd_step
from loro_jax.exact.step import Batch, ExactStep
from loro_jax.linalg.batching import joins_the_batch, one_by_one, varying_alike

Array = jax.Array

_StepOfOne = Callable[..., ExactStep]
# Of the k-th pair, from and to the factors (B, A) of each batch.
_Read = Callable[[Any, Any], Batch]
_Write = Callable[[Any, Any, ExactStep], Any]

# The methods by name, from the fastest to the most accurate. Pairs for which one is not accurate
# fall back to the next; the last is the reference.
METHODS = ("graph", "gram", "svd")

# Of single pairs; the first method comes for whole batches only.
_STEP_OF_ONE: dict[str, _StepOfOne] = {"gram": gram_step, "svd": svd_step}

# What "auto" stands for: the fastest.
_AUTO = METHODS[0]


def check_method(method: str, where: str) -> None:
    """Raises ValueError unless ``method`` names an exact step."""
    if method not in ("auto", *METHODS):
        expected = ("auto", *METHODS)
        raise ValueError(f"{where}: the method must be one of {expected}, but is {method!r}.")


def retract(method: str, batches: Sequence[Batch], basis: str = "singular") -> list[ExactStep]:
    """Takes exact steps of batches of pairs; ``ok`` is True for pairs without a fallback.

    What depends on the rank alone is compiled once for all batches of a rank: the factorisations of
    the default method, and the fallbacks.

    Args:
        method: "auto" (which is "graph"), "graph", "gram" or "svd".
        batches: pairs, one batch for each shape.
        basis: basis of the new factors, "singular" or "nearest".

    Returns:
        The new factors of each batch and ``ok`` (N,).
    """
    method = _AUTO if method == "auto" else method
    steps: dict[int, ExactStep] = {}
    of_rank: dict[Any, list[int]] = {}
    for i, batch in enumerate(batches):
        if len(batch.B) == 0:
            steps[i] = ExactStep(batch.B, batch.A, jnp.zeros(0, bool))
        else:
            of_rank.setdefault((batch.A.shape[-2], batch.A.dtype), []).append(i)
    for members in of_rank.values():
        # NumPy arrays can't be indexed by the traced index of a loop.
        arguments = jax.tree.map(jnp.asarray, [batches[i] for i in members])
        found = _retract(method, basis, varying_alike(arguments))
        steps |= dict(zip(members, found, strict=True))
    return [steps[i] for i in range(len(batches))]


# Jitted for calls outside of jit, which would otherwise trace and compile loops and branches in
# each call. The custom_jvp refuses derivatives, with a message that says what to do. A vmap, of an
# ensemble for example, only makes the batches larger.
@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def _retract(method: str, basis: str, batches: Sequence[Batch]) -> list[ExactStep]:
    @joins_the_batch
    def steps(batches: Sequence[Batch]) -> list[ExactStep]:
        if method == "svd":
            return _by_the_reference(basis, batches)
        if method == "graph":
            first = graph_steps(batches, basis)
        else:
            of_one = functools.partial(_STEP_OF_ONE[method], basis=basis)
            # (one_by_one loops on CPU and batches elsewhere.)
            first = [one_by_one(of_one, 1)(*batch) for batch in batches]
            first = [_or_old(step, batch) for step, batch in zip(first, batches, strict=True)]
        return _with_fallbacks(METHODS[METHODS.index(method) + 1 :], basis, batches, first)

    return steps(batches)


@_retract.defjvp
def _no_derivative(method: str, basis: str, primals: Any, tangents: Any) -> Any:
    raise NotImplementedError(
        "loro: an exact step has no derivative. Differentiate through steps without exact ones "
        "(exact_every=None), or keep the step out of it by jax.lax.stop_gradient."
    )


def _or_old(step: ExactStep, batch: Batch) -> ExactStep:
    """Replaces new factors that are not trusted by the old ones."""
    ok = step.ok[:, None, None]
    return ExactStep(jnp.where(ok, step.B, batch.B), jnp.where(ok, step.A, batch.A), step.ok)


def _by_the_reference(basis: str, batches: Sequence[Batch]) -> list[ExactStep]:
    """Steps all pairs by the reference, one by one, in one program for all shapes."""
    step = functools.partial(_if_finite, functools.partial(_by_first_trusted, ("svd",), basis))
    read, write = _access(batches)

    def one_more(k: Any, factors: Any) -> Any:
        return write(k, factors, step(read(k, factors)))

    old = varying_alike([(batch.B, batch.A) for batch in batches])
    factors = jax.lax.fori_loop(0, starts_of(batches)[-1], one_more, old)
    return [
        ExactStep(B, A, jnp.ones_like(batch.size.rate, dtype=bool))
        for (B, A), batch in zip(factors, batches, strict=True)
    ]


def _with_fallbacks(
    methods: Sequence[str], basis: str, batches: Sequence[Batch], first: Sequence[ExactStep]
) -> list[ExactStep]:
    """Steps the pairs that the first method does not trust, one by one, by the other methods.

    Args:
        methods: names of methods, each the fallback of the one before.
        basis: basis of the new factors.
        batches: the pairs.
        first: the first method's steps; where they are not trusted, they hold the old factors.

    Returns:
        The steps; ``ok`` stays that of the first method, because the fallbacks are counted by it.
    """
    step = functools.partial(_if_finite, functools.partial(_by_first_trusted, methods, basis))
    read, write = _access(batches)

    def one_more(state: tuple[Array, Any]) -> tuple[Array, Any]:
        to_do, factors = state
        k = jnp.argmax(to_do)
        return to_do.at[k].set(False), write(k, factors, step(read(k, factors)))

    to_do = ~jnp.concatenate([step.ok for step in first])
    state = varying_alike((to_do, [(step.B, step.A) for step in first]))
    _, factors = jax.lax.while_loop(lambda state: jnp.any(state[0]), one_more, state)
    return [ExactStep(B, A, step.ok) for (B, A), step in zip(factors, first, strict=True)]


def _access(batches: Sequence[Batch]) -> tuple[_Read, _Write]:
    """Returns functions that read and write the k-th pair of all batches.

    All shapes are padded to the largest by zero rows of B and zero columns of A, which change
    nothing: so there is one program, whose factorisations take long to compile and seldom run.
    """
    starts = starts_of(batches)
    m, n = max(b.B.shape[1] for b in batches), max(b.A.shape[2] for b in batches)

    def read(k: Any, factors: Any) -> Batch:
        found: Any = None
        for (B, A), batch, start in zip(factors, batches, starts, strict=False):
            one = jax.tree.map(
                lambda x, k=k - start: x[jnp.clip(k, 0, len(x) - 1)], batch._replace(B=B, A=A)
            )
            one = one._replace(
                B=_padded(one.B, m, 0),
                dB=_padded(one.dB, m, 0),
                A=_padded(one.A, n, 1),
                dA=_padded(one.dA, n, 1),
            )
            # The pair is in the last batch that starts at or before k.
            if found is not None:
                one = jax.tree.map(lambda x, y, here=k >= start: jnp.where(here, x, y), one, found)
            found = one
        return found

    def write(k: Any, factors: Any, step: ExactStep) -> Any:
        written = []
        for (B, A), (start, end) in zip(factors, itertools.pairwise(starts), strict=True):
            i = jnp.clip(k - start, 0, end - start - 1)
            mine = (k >= start) & (k < end)
            # A pair of another batch leaves this one as it is. A `cond` around the whole array
            # would copy it.
            B = B.at[i].set(jnp.where(mine, step.B[: B.shape[1]], B[i]))
            A = A.at[i].set(jnp.where(mine, step.A[:, : A.shape[2]], A[i]))
            written.append((B, A))
        return written

    return read, write


def _padded(x: Array, length: int, axis: int) -> Array:
    widths = [(0, 0), (0, 0)]
    widths[axis] = (0, length - x.shape[axis])
    return jnp.pad(x, widths)


def _if_finite(step: Callable[[Batch], ExactStep], pair: Batch) -> ExactStep:
    """Steps a pair, or returns NaN at once if it is not finite.

    No factorisation helps then, and those of NaN take longest: where all gradients are NaN, all
    pairs would go through them before the run can end.
    """
    inputs = (pair.B, pair.A, pair.dB, pair.dA)
    finite = functools.reduce(jnp.logical_and, [jnp.all(jnp.isfinite(x)) for x in inputs])

    def undefined(pair: Batch) -> ExactStep:
        return ExactStep(pair.B * jnp.nan, pair.A * jnp.nan, jnp.zeros_like(finite))

    return jax.lax.cond(finite, step, undefined, pair)


def _by_first_trusted(methods: Sequence[str], basis: str, pair: Batch) -> ExactStep:
    """Steps one pair by the first of the methods that trusts its result."""

    def by_the_last(pair: Batch) -> ExactStep:
        return _STEP_OF_ONE[methods[-1]](*pair, basis=basis)

    def one_after_the_other(pair: Batch) -> ExactStep:
        step = _STEP_OF_ONE[methods[0]](*pair, basis=basis)
        rest = methods[1:]
        return jax.lax.cond(step.ok, lambda: step, lambda: _by_first_trusted(rest, basis, pair))

    if len(methods) == 1:
        return by_the_last(pair)
    # On TPU the reference is made of products, too, and what is between is not worth its
    # compilation.
    return jax.lax.platform_dependent(pair, tpu=by_the_last, default=one_after_the_other)
