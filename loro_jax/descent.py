"""Descent on trees of (B, A) pairs and other leaves: the framework behind :func:`loro_jax.loro`.

Every step computes a direction (Adam's, for example) from the gradients of all leaves. Then, for
the factors of each pair W = B A:

* most steps are approximate (equation 11): ``B -= lr s u_B`` and ``A -= lr s u_A``, with
  ``s = r / min(m, n)``, because the factors' gradients are larger than the product's;
* every K-th step is exact (Proposition 4): the product moves along the tangent space of the rank-r
  matrices and is retracted to their manifold, with the plain ``lr``. The new factors have a new
  basis, in which the old moments have no meaning: they are reset, or transported.

All other leaves step along their direction with ``lr`` on every step.

Source: Mo, Huang and Pan, ICLR 2025, Algorithm 1.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from loro_jax.branch_operand import BranchOperand, branch_operand
from loro_jax.directions.adam import adam
from loro_jax.directions.protocol import Direction, as_direction
from loro_jax.factor_steps import FactorStep, approximate_updates, exact_updates, transported
from loro_jax.leaves import (
    WeightDecay,
    complete,
    decayed_leaves,
    in_arrays,
    split_weight_decay,
    with_holes_of,
)
from loro_jax.linalg.batching import count_of_none, varying_alike
from loro_jax.pair_parallel import shardings_on_mesh
from loro_jax.pairs import Both, Pairs, PairsSpec, check_spec, pairs_of
from loro_jax.place_in_chain import warn_unless_last
from loro_jax.refresh import refreshed
from loro_jax.schedules import is_never, value_at

Array = jax.Array

MOMENTS = ("reset", "reset_factors", "transport", "keep")


class LoroState(NamedTuple):
    """State of :func:`loro` and :func:`riemannian_descent`.

    Attributes:
        count: steps taken, int32 scalar; never reset.
        stale: 1 if the last step was exact, so that the next one starts by resetting the moments
            below; else 0. (Zeroing the moments in the exact step itself would cost every step a
            copy of them: XLA updates a buffer in place only if the update is computed from its new
            content.)
        fallbacks: number of exact steps of single matrices so far in which the chosen method fell
            back to another, int32 scalar; see :mod:`loro_jax.exact`.
        factors: state of the factors' direction (Adam), with ``optax.MaskedNode`` at other leaves.
        regular: state for the other leaves, with ``optax.MaskedNode`` at the factors.
    """

    count: Array  # type: ignore[assignment]  # shadows tuple.count, as in Optax
    stale: Array
    fallbacks: Array
    factors: Any
    regular: Any


def riemannian_descent(
    learning_rate: optax.ScalarOrSchedule,
    direction: optax.GradientTransformation | Direction,
    exact_step: Callable[..., Any] | None,
    exact_every: int | optax.Schedule | None = 500,
    *,
    lr_scale: jax.typing.ArrayLike | None = None,
    moments: str | None = None,
    weight_decay: WeightDecay = 0.0,
    regular: optax.GradientTransformation | Direction | None = None,
    pairs: PairsSpec | None = None,
    mesh: Any | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Builds a low-rank Riemannian optimizer from any direction and any exact step.

    Args:
        learning_rate: a number or a schedule, as for :func:`loro`.
        direction: turns gradients into directions: :func:`loro_jax.adam`,
            :func:`loro_jax.orthogonal`, a :class:`loro_jax.directions.protocol.Direction`, or an
            Optax transformation such as ``optax.trace(0.9)``, which must not scale by a learning
            rate.
        exact_step: takes ``(B, A, dB, dA, learning_rate, step)`` for a batch of pairs of one shape,
            (N, m, r) and (N, r, n), with the step counted from 0. It returns the new factors, and
            optionally an int32 count to add to the state's ``fallbacks``. None if ``exact_every``
            is None.
        exact_every: K.
        lr_scale: factor on the learning rate of approximate steps; None: the direction's.
        moments: None is "reset". "transport" needs a direction whose state has a first moment
            ``mu`` and optionally a second one, ``nu``, like Adam's.
        weight_decay: decoupled decay, a number or a pair ``(number, mask)``.
        regular: optimizer of the leaves that are not factors.
        pairs: None, "optional", "all", or a spec.
        mesh: devices that share the exact steps, or the parameters' shardings.

    Returns:
        An ``optax.GradientTransformationExtraArgs``.

    Raises:
        ValueError: as :func:`loro`.

    Example:
        Momentum as the direction, and a dense truncated SVD as the retraction:

        >>> import jax, jax.numpy as jnp, optax
        >>> from loro_jax import LowRank, from_dense, riemannian_descent, riemannian_gradient
        >>> def dense_step(B, A, dB, dA, learning_rate, step):
        ...     W = B @ A - learning_rate * riemannian_gradient(B, A, dB, dA)
        ...     return from_dense(W, rank=B.shape[-1])
        >>> tx = riemannian_descent(0.01, optax.trace(0.9), dense_step, exact_every=10)
        >>> params = {"w": LowRank(jnp.ones((6, 2)), jnp.eye(2, 4))}
        >>> updates, state = tx.update(params, tx.init(params), params)
    """
    check_spec(pairs)
    descent = _made(
        learning_rate, direction, exact_step, exact_every, lr_scale, moments, weight_decay, regular
    )

    def init(params: Any) -> LoroState:
        # Without exact steps the updates are linear in the learning rate: scaling them is fine.
        if descent.exact_every is not None:
            warn_unless_last("loro")
        params = in_arrays(params)
        factors, others = pairs_of(params, pairs).split(params)
        state = LoroState(
            count=jnp.zeros([], jnp.int32),
            # Not a boolean: selecting between states by arithmetic would turn it into an integer.
            stale=jnp.zeros([], jnp.int32),
            # On the factors' mesh from the start: a step must not change the type of the state.
            fallbacks=count_of_none(factors),
            factors=descent.direction.init(factors),
            regular=descent.regular.init(others),
        )
        if descent.moments == "transport":
            _check_has_moments(state.factors)
        return state

    def update(
        grads: Any, state: LoroState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, LoroState]:
        if params is None:
            raise ValueError("loro: update needs the parameters: tx.update(grads, state, params).")
        # The holes (None) of the given gradients are filled for the step and restored at the end.
        params, given_grads = in_arrays(params), grads
        grads = complete(in_arrays(grads), params)
        found = pairs_of(params, pairs)
        now = _now(descent, found, params, mesh, state.count)

        # The reset that the previous exact step asked for comes first: see LoroState.stale.
        states = _refresh(descent, state, now)
        factor_updates, factor_state, fallbacks = _step_factors(
            descent, now, found.split(grads)[0], states[0], extra_args
        )
        other_updates, regular_state = _step_others(
            descent, now, found.split(grads)[1], states[1], extra_args
        )

        updates = with_holes_of(given_grads, found.join(grads, factor_updates, other_updates))
        # Saturates instead of overflowing, like optax.safe_increment.
        fallbacks = jnp.minimum(state.fallbacks, jnp.iinfo(jnp.int32).max - fallbacks) + fallbacks
        return updates, LoroState(
            optax.safe_increment(state.count),
            now.exact.astype(jnp.int32),
            fallbacks,
            factor_state,
            regular_state,
        )

    return optax.GradientTransformationExtraArgs(init, update)


class _Descent(NamedTuple):
    """The settings of a descent, checked."""

    learning_rate: optax.ScalarOrSchedule
    direction: Direction
    branch: BranchOperand
    exact_step: Callable[..., Any] | None
    exact_every: int | optax.Schedule | None
    lr_scale: Any
    moments: str
    weight_decay: Any
    mask: Any
    regular: Any  # a Direction, or a transformation with its own learning rate


class _Now(NamedTuple):
    """The inputs of one step: parameters, schedules' values, and whether it is exact."""

    pairs: Pairs
    factors: Any  # the parameters that are factors, MaskedNode elsewhere
    others: Any  # all other parameters, MaskedNode elsewhere
    other_decays: list[bool]
    step: FactorStep
    exact: Array


def _made(
    learning_rate: Any,
    direction: Any,
    exact_step: Any,
    exact_every: Any,
    lr_scale: Any,
    moments: str | None,
    weight_decay: WeightDecay,
    regular: Any,
) -> _Descent:
    """Checks the settings and fills in defaults that depend on others."""
    if isinstance(exact_every, numbers.Integral) and exact_every < 1:
        raise ValueError(f"loro: exact_every must be at least 1 (or None), but is {exact_every}.")
    if is_never(exact_every):
        exact_every = None
    if exact_step is None and exact_every is not None:
        raise ValueError(f"loro: exact_every is {exact_every}, but exact_step is None.")
    moments = "reset" if moments is None else moments
    if moments not in MOMENTS:
        raise ValueError(f"loro: moments must be one of {MOMENTS} or None, but is {moments!r}.")
    direction = as_direction(direction)
    if regular is None:
        # Moves are defined for pairs only: they need both factors.
        regular = adam() if direction.kind == "moves" else direction
    elif not isinstance(regular, Direction):
        regular = optax.with_extra_args_support(regular)
    number, mask = split_weight_decay(weight_decay)
    # Only moments that the next step resets may be overwritten by the moves.
    overwritten = moments in ("reset", "reset_factors") and exact_every is not None
    return _Descent(
        learning_rate,
        direction,
        branch_operand(direction, overwritten),
        exact_step,
        exact_every,
        direction.lr_scale if lr_scale is None else lr_scale,
        moments,
        number,
        mask,
        regular,
    )


def _now(descent: _Descent, pairs: Pairs, params: Any, mesh: Any, count: Array) -> _Now:
    """Evaluates the schedules, and splits the parameters into pairs and other leaves."""
    factors, others = pairs.split(params)
    flags = decayed_leaves(descent.mask, params)
    if isinstance(descent.weight_decay, numbers.Real) and descent.weight_decay == 0:
        # XLA computes 0 * p, and copies parameters whose buffers the step overwrites for it.
        flags = [False] * len(flags)
    decays, other_decays = pairs.choose(flags)
    step = FactorStep(
        # The count before this step: schedules start from 0, as in Optax.
        value_at(descent.learning_rate, count),
        count,
        descent.lr_scale,
        descent.weight_decay,
        descent.exact_step,
        pairs.take(factors),
        decays,
        *shardings_on_mesh(mesh, params, pairs),
    )
    return _Now(pairs, factors, others, other_decays, step, _is_exact(descent.exact_every, count))


def _is_exact(every: Any, step: Array) -> Array:
    """Returns whether a step, counted from 0, is exact."""
    if every is None:
        return jnp.bool_(False)
    # Exact are the K-th step, the 2K-th, and so on. Where the count saturates, at 2^31 - 1, no step
    # is exact unless all are: that number is prime.
    taken = optax.safe_increment(step)
    if callable(every):
        period = every(step)
        if period is None or is_never(period):
            return jnp.bool_(False)
        # A period of 0 means never; the maximum keeps the unused modulo defined.
        return (period > 0) & (taken % jnp.maximum(period, 1) == 0)
    return taken % every == 0


def _refresh(descent: _Descent, state: LoroState, now: _Now) -> tuple[Any, Any]:
    """Resets the moments that the last step made stale."""
    factor_state, regular_state = state.factors, state.regular
    stale = state.stale > 0
    # An Optax transformation passed as `regular` keeps its state: other leaves have no basis that
    # changes. A direction is reset with the factors', as in the paper's algorithm.
    if descent.moments in ("reset", "reset_factors"):
        fresh = descent.direction.init(now.factors)
        factor_state = refreshed(stale, fresh, factor_state, now.factors)
    if descent.moments == "reset" and isinstance(descent.regular, Direction):
        fresh = descent.regular.init(now.others)
        regular_state = refreshed(stale, fresh, regular_state, now.others)
    return factor_state, regular_state


def _step_factors(
    descent: _Descent, now: _Now, grads: Any, state: Any, extra_args: dict[str, Any]
) -> tuple[Any, Any, Array]:
    """Returns updates of the factors, exact or approximate, their state, and the fallbacks."""
    pairs, branch, factors = now.pairs, descent.branch, now.factors
    operand, state = branch.advance(grads, state, factors, pairs, **extra_args)
    # Both branches of the conditional must return the dtypes that the moves have.
    operand = jax.tree.map(lambda c, p: c.astype(p.dtype), operand, factors)
    fallbacks = count_of_none(factors)
    # Without exact steps no branch is compiled at all.
    if pairs and descent.exact_every is not None:
        take = _exact_with_transport if descent.moments == "transport" else _exact
        operand, state, fallbacks = take(descent, now, operand, state, fallbacks)

    # The approximate update is computed outside of the branch, where XLA fuses it with the code
    # that applies it. After an exact step, `operand` holds the moves and the approximate updates
    # are discarded.
    directions = pairs.take(branch.finish(operand, state))
    updates = jax.tree.map(
        lambda move, approximate: jnp.where(now.exact, move, approximate),
        pairs.take(operand),
        approximate_updates(now.step, directions),
    )
    # After an exact step `keep` may put moves in the place of first moments: the next step begins
    # by resetting these.
    return pairs.put(factors, updates), branch.keep(state, operand), fallbacks


def _exact(
    descent: _Descent, now: _Now, operand: Any, state: Any, fallbacks: Array
) -> tuple[Any, Any, Array]:
    """Replaces the operand by the exact step's moves if the step is exact.

    The other branch costs nothing: it returns its arguments, in place.
    """

    def moves(operand: list[Both], none: Array) -> tuple[list[Both], Array]:
        # Finished inside the branch, so that Adam's directions are stored on exact steps only.
        tree = descent.branch.finish(now.pairs.put(now.factors, operand), state)
        updates, count = exact_updates(now.step, now.pairs.take(tree))
        return updates, none + count

    moved, fallbacks = _either(
        now.exact,
        moves,
        lambda *unchanged: unchanged,
        # New factors depend on both sides of a pair, so under a shard_map each varies over the
        # axes of both; the two branches must agree in this.
        [varying_alike(pair) for pair in now.pairs.take(operand)],
        fallbacks,
    )
    return now.pairs.put(operand, moved), state, fallbacks


def _exact_with_transport(
    descent: _Descent, now: _Now, operand: Any, state: Any, fallbacks: Array
) -> tuple[Any, Any, Array]:
    """Does the same as :func:`_exact`, and transports the state's moments."""
    names = _moments_of(state)
    moments = [now.pairs.take(getattr(state, name)) for name in names]

    # Moments that are transported are not overwritten, so the operand is the directions themselves
    # (see `branch_operand`), and there is nothing to finish.
    def moves(directions: list[Both], moments: list[list[Both]], none: Array) -> Any:
        updates, count = exact_updates(now.step, directions)
        return updates, transported(now.step, directions, updates, moments), none + count

    # Transported moments depend on both sides of a pair, too, and must vary over the axes of both.
    rows = [varying_alike(row) for row in zip(now.pairs.take(operand), *moments, strict=True)]
    directions, *columns = ([*column] for column in zip(*rows, strict=True))
    moved, moments, fallbacks = _either(
        now.exact, moves, lambda *unchanged: unchanged, directions, columns, fallbacks
    )
    new = {
        name: now.pairs.put(getattr(state, name), column)
        for name, column in zip(names, moments, strict=True)
    }
    return now.pairs.put(operand, moved), state._replace(**new), fallbacks


def _either(exact: Array, yes: Callable[..., Any], no: Callable[..., Any], *x: Any) -> Any:
    """Runs one of two branches; outside of jit only that branch, operation by operation.

    Outside of jit ``jax.lax.cond`` would compile both branches, again in each call.
    """
    if isinstance(exact, jax.core.Tracer):
        return jax.lax.cond(exact, yes, no, *x)
    return yes(*x) if exact else no(*x)


def _step_others(
    descent: _Descent, now: _Now, grads: Any, state: Any, extra_args: dict[str, Any]
) -> tuple[Any, Any]:
    """Returns updates of the leaves that are not factors, and their state."""
    if not isinstance(descent.regular, Direction):
        return descent.regular.update(grads, state, now.others, **extra_args)
    # None of these leaves belongs to a pair.
    directions, state = descent.regular.update(grads, state, now.others, Pairs(), **extra_args)
    # As in AdamW, decay is added to the direction and scaled by the learning rate. tree.map visits
    # leaves in the order of `other_decays`, so one iterator serves them all.
    flags = iter(now.other_decays)
    rate, weight_decay = now.step.rate, now.step.weight_decay
    updates = jax.tree.map(
        lambda u, p: (-rate * (u + weight_decay * p if next(flags) else u)).astype(p.dtype),
        directions,
        now.others,
    )
    return updates, state


def _check_has_moments(state: Any) -> None:
    if not _moments_of(state):
        raise ValueError(
            'loro: moments="transport" carries moments; it needs a direction whose state has '
            f"mu (and perhaps nu), but this one's is a {type(state).__name__}."
        )


def _moments_of(state: Any) -> list[str]:
    """Returns which of mu and nu a state has; none without mu."""
    names = [name for name in ("mu", "nu") if hasattr(state, name)]
    return names if "mu" in names else []
