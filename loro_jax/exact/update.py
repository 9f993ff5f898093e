"""The exact step of one pair or batches of pairs (Proposition 4), for use in optimizers."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from loro_jax.checks import check_not_negative, checked_numbers
from loro_jax.exact import Batch, StepSize, check_basis, check_method, retract
from loro_jax.exact.tangent import as_gradients, check_directions
from loro_jax.linalg.batching import count_of_none
from loro_jax.linalg.precision import at_least_float32
from loro_jax.lowrank import rank_ratio
from loro_jax.schedules import value_at

Array = jax.Array

# (B, A, dB, dA, learning rate, number of the step) -> (new B, new A, how many pairs fell back).
StepOfPairs = Callable[[Array, Array, Array, Array, Any, Array], tuple[Array, Array, Array]]


class PairBatch(NamedTuple):
    """Pairs of one shape: arrays (..., m, r) and (..., r, n), and their learning rate."""

    B: Array
    A: Array
    dB: Array
    dA: Array
    rate: Any


# (batches, number of the step) -> (new B and A of each batch, how many pairs fell back).
StepOfBatches = Callable[[Sequence[PairBatch], Array], tuple[list[tuple[Array, Array]], Array]]


@dataclasses.dataclass(frozen=True)
class SharedStep:
    """An exact step that takes batches of all shapes together, and shares programs between them.

    It is also a function of one batch, as :func:`loro_jax.riemannian_descent` expects it.

    Attributes:
        of_batches: the step.
    """

    of_batches: StepOfBatches

    def __call__(
        self, B: Array, A: Array, dB: Array, dA: Array, rate: Any, number: Array
    ) -> tuple[Array, Array, Array]:
        """Steps one batch."""
        (new,), count = self.of_batches([PairBatch(B, A, dB, dA, rate)], number)
        return *new, count


def exact_update(
    B: Array,
    A: Array,
    dB: Array,
    dA: Array,
    learning_rate: jax.typing.ArrayLike,
    *,
    method: str = "auto",
    max_move: jax.typing.ArrayLike | None = None,
    damping: jax.typing.ArrayLike | None = None,
    basis: str = "singular",
) -> tuple[Array, Array]:
    """Takes an exact Riemannian step of one pair or a batch of pairs (Proposition 4).

    Moves W = B A against the Riemannian gradient and retracts by the truncated SVD:
    ``W' = SVD_r(W - learning_rate * grad)``, where grad is the tangent vector of the directions dB
    and dA (:func:`riemannian_gradient`). W is never formed: all matrices have width r. The new
    factors are balanced: the singular values of both are the square roots of those of W'. This
    determines them up to a rotation of the inner index, which ``basis`` chooses.

    Args:
        B: output-side factor, shape (..., m, r).
        A: input-side factor, shape (..., r, n).
        dB: gradient (or direction) of B, same shape as B.
        dA: gradient (or direction) of A, same shape as A.
        learning_rate: step size, a scalar.
        method: "graph", "gram" or "svd", from the fastest to the most accurate; pairs for which a
            method is not accurate fall back to the next. "auto" is "graph". See
            :mod:`loro_jax.exact`.
        max_move: trust region. The step is cut so that ``learning_rate |grad| <= max_move |W|`` in
            Frobenius norms; W then moves by at most ``2 max_move |W|``, because the retraction at
            most doubles the distance. None: no bound, as in the paper.
        damping: d >= 0. The gradient's ``(B^T B)^{-1}`` and ``(A A^T)^{-1}`` become
            ``(B^T B + d |B|^2 / r I)^{-1}`` and its counterpart for A: steps along small singular
            values are shortened, others hardly change. None: none, as in the paper.
        basis: "singular", the paper's: the inner index orders singular values. "nearest": the
            balanced factors B' and A' of W' closest to B and A, so that averages in the basis of
            the old factors remain valid. See :mod:`loro_jax.exact.basis`.

    Returns:
        B' and A', same shapes and dtypes as B and A. Computed in float32, or wider if the
        factors are.

    Raises:
        ValueError: if the shapes do not form a pair of rank r <= min(m, n), the factors do not have
            a real floating-point dtype, the shapes of dB and dA differ from theirs, or the method
            or the basis is unknown.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> keys = jax.random.split(jax.random.key(0), 3)
        >>> B, A = jax.random.normal(keys[0], (6, 2)), jax.random.normal(keys[1], (2, 5))
        >>> G = jax.random.normal(keys[2], (6, 5))
        >>> B_new, A_new = exact_update(B, A, G @ A.T, B.T @ G, learning_rate=0.1)
        >>> bool(jnp.allclose(B_new.T @ B_new, A_new @ A_new.T, atol=1e-4))
        True
        >>> zero = jnp.zeros_like(B_new), jnp.zeros_like(A_new)
        >>> B_same, _ = exact_update(B_new, A_new, *zero, learning_rate=0.1, basis="nearest")
        >>> bool(jnp.allclose(B_same, B_new, atol=1e-4))
        True
    """
    size = StepSize(learning_rate, max_move, damping)
    batch = Batch(B, A, dB, dA, size)
    (new,), _ = counted_exact_updates([batch], method=method, basis=basis, where="exact_update")
    return new


def counted_exact_updates(
    batches: Sequence[Batch], *, method: str, where: str, basis: str = "singular"
) -> tuple[list[tuple[Array, Array]], Array]:
    """Does the same as :func:`exact_update` for several batches, and counts the fallbacks (int32).

    Args:
        batches: pairs with any leading axes, and a step size of scalars for each batch.
        method: as for :func:`exact_update`.
        where: the function that was called, for error messages.
        basis: as for :func:`exact_update`.
    """
    check_method(method, where)
    check_basis(basis, where)
    flat = []
    for B, A, dB, dA, size in batches:
        check_directions(B, A, dB, dA, where)
        dtype = at_least_float32(jnp.promote_types(B.dtype, A.dtype))
        # Leading axes become one, of length one if there is none.

        def one_axis(x: Array, dtype: Any = dtype) -> Array:
            return x.reshape(-1, *x.shape[-2:]).astype(dtype)

        arrays = Batch(one_axis(B), one_axis(A), one_axis(dB), one_axis(dA), size)
        each = functools.partial(_for_each, len(arrays.B), dtype)
        flat.append(arrays._replace(size=jax.tree.map(each, size)))
    steps = retract(method, flat, basis)
    news = [
        (step.B.reshape(b.B.shape).astype(b.B.dtype), step.A.reshape(b.A.shape).astype(b.A.dtype))
        for step, b in zip(steps, batches, strict=True)
    ]
    return news, sum((jnp.sum(~x.ok, dtype=jnp.int32) for x in steps), start=count_of_none(flat))


def _for_each(count: int, dtype: Any, number: Any) -> Array:
    return jnp.broadcast_to(jnp.asarray(number, dtype), (count,))


def exact_step(
    *,
    method: str = "auto",
    basis: str = "singular",
    max_move: Any | None = None,
    damping: Any | None = None,
    where: str = "exact_step",
) -> SharedStep:
    """Makes the exact step of Proposition 4 for :func:`loro_jax.riemannian_descent`.

    Args:
        method: as for :func:`exact_update`.
        basis: as for :func:`exact_update`.
        max_move: as for :func:`exact_update`, or a schedule.
        damping: as for :func:`exact_update`, or a schedule.
        where: the function that was called, for error messages.

    Returns:
        A function of B, A, their directions, the learning rate and the number of the step, which
        also takes batches of several shapes together.

    Raises:
        ValueError: for an unknown method or basis, and negative or too narrow numbers.
    """
    check_method(method, where)
    check_basis(basis, where)
    check_not_negative(where, max_move=max_move, damping=damping)
    max_move, damping = checked_numbers(where, max_move=max_move, damping=damping)

    def take(batches: Sequence[PairBatch], number: Array) -> Any:
        move, damp = value_at(max_move, number), value_at(damping, number)
        sized = [Batch(*batch[:4], StepSize(batch.rate, move, damp)) for batch in batches]
        return counted_exact_updates(sized, method=method, basis=basis, where=where)

    return SharedStep(take)


def together(step: StepOfPairs) -> StepOfBatches:
    """Returns an exact step of batches of all shapes, which takes them one by one if it must."""
    if isinstance(step, SharedStep):
        return step.of_batches

    def one_by_one(batches: Sequence[PairBatch], number: Array) -> Any:
        news: list[tuple[Array, Array]] = []
        total = count_of_none(batches)
        for batch in batches:
            # The count is optional for a user's exact step: without it, no fallback is assumed.
            B_new, A_new, *count = step(*batch, number)
            news.append((B_new, A_new))
            total = sum(count, start=total)
        return news, total

    return one_by_one


def of_other_directions(
    step: StepOfPairs, gradients: Callable[[PairBatch], PairBatch]
) -> SharedStep:
    """Makes an exact step for other directions than gradients.

    Args:
        step: an exact step for gradients.
        gradients: turns the directions (and the learning rate) into those of gradients.
    """

    def take(batches: Sequence[PairBatch], number: Array) -> Any:
        return together(step)([gradients(batch) for batch in batches], number)

    return SharedStep(take)


def of_moves(step: StepOfPairs, lr_scale: Any | None) -> SharedStep:
    """Makes an exact step for directions that are moves of the factors, not gradients.

    Args:
        step: an exact step for gradients.
        lr_scale: factor on the learning rate, which applies to moves on exact steps too; None:
            r / min(m, n).
    """

    def gradients(batch: PairBatch) -> PairBatch:
        B, A, dB, dA, rate = batch
        scale = rank_ratio(B, A) if lr_scale is None else lr_scale
        return PairBatch(B, A, *as_gradients(B, A, dB, dA), rate * scale)

    return of_other_directions(step, gradients)
