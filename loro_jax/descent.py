"""Descent on trees of (B, A) pairs and other leaves: the frame that :func:`loro_jax.loro` fills.

Every step, a direction (Adam, say) is made of the gradients of all leaves. Then, for the factors of
each pair W = B A:

* on most steps (approximate, equation 11) ``B -= lr s u_B`` and ``A -= lr s u_A``, with
  ``s = r / min(m, n)``: the factors' gradients are larger than the product's;
* on every K-th step (exact, Proposition 4) the product moves along the manifold of rank-r
  matrices and is retracted to it, with ``lr`` itself. The new factors have a new basis, in which
  the old moments mean nothing: they are refreshed, or carried over.

All other leaves step along their direction with ``lr`` on every step.

Source: Mo, Huang and Pan, ICLR 2025, Algorithm 1.
"""

from __future__ import annotations

import functools
import numbers
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from loro_jax.directions.protocol import Direction, as_direction
from loro_jax.exact.transport import transport_moments
from loro_jax.leaves import Mask, complete, decayed_leaves, in_arrays, with_holes_of
from loro_jax.linalg.batching import count_of_none, varying_alike
from loro_jax.pair_parallel import homes_on_mesh, map_pairs
from loro_jax.pairs import Pair, PairsSpec, describe_leaves, find_pairs
from loro_jax.place_in_chain import warn_unless_last
from loro_jax.refresh import refreshed
from loro_jax.schedules import is_never

REFRESH_CHOICES = ("all", "factors", "transport", None)


class LoroState(NamedTuple):
    """State of :func:`loro` and :func:`riemannian_descent`.

    Attributes:
        count: steps taken, int32 scalar; never reset.
        stale: 1 if the last step was exact and the next begins with a refresh, so that the moments
            below have no meaning any more for the refreshed leaves; else 0. (Zeroing the moments
            with the exact step itself would cost every step a copy of them: XLA can update a
            buffer in place only when its new content is also what the update is made of. An int32,
            as a choice between states by arithmetic makes one of a boolean.)
        fallbacks: how many exact steps of single matrices the chosen method left to another so
            far, int32 scalar; see :mod:`loro_jax.exact`.
        factors: state of the factors' direction (Adam), with ``optax.MaskedNode`` at other leaves.
        regular: state for the other leaves, with ``optax.MaskedNode`` at the factors.
    """

    count: jax.Array  # type: ignore[assignment]  # shadows tuple.count, as in Optax
    stale: jax.Array
    fallbacks: jax.Array
    factors: Any
    regular: Any


def riemannian_descent(
    learning_rate: optax.ScalarOrSchedule,
    direction: optax.GradientTransformation | Direction,
    exact_step: Callable[..., Any],
    *,
    exact_every: int | optax.Schedule | None = 500,
    refresh: str | None = "all",
    lr_scale: float | None = None,
    weight_decay: jax.typing.ArrayLike = 0.0,
    mask: Mask = None,
    pairs: PairsSpec | None = None,
    require_pairs: bool = True,
    regular: optax.GradientTransformation | None = None,
    regular_direction: optax.GradientTransformation | Direction | None = None,
    mesh: Any | None = None,
) -> optax.GradientTransformationExtraArgs:
    """LORO with any direction and any exact step.

    Args:
        learning_rate: as for :func:`loro`, like all arguments that are not named here.
        direction: what turns gradients into directions, such as ``optax.scale_by_adam()``,
            ``optax.trace(0.9)`` or ``optax.identity()``; it must not scale by a learning rate.
        exact_step: takes ``(B, A, dB, dA, learning_rate, step)`` for a batch of pairs of one shape,
            (N, m, r) and (N, r, n), with the number of the step from 0. It returns the new factors,
            and may return as a third value an int32 count to add to the state's ``fallbacks``.
        exact_every: K.
        refresh: "transport" needs a direction whose state has a first moment ``mu``, and perhaps a
            second one, ``nu``, as Adam's.
        lr_scale: factor on the learning rate of approximate steps.
        weight_decay: decoupled decay.
        mask: which leaves it is for.
        pairs: None, or a spec.
        require_pairs: raise when the tree holds no pair.
        regular: transformation for all leaves that are not factors.
        regular_direction: direction for those leaves; None: the same as for the factors.
        mesh: devices that share the exact steps, or where the parameters lie.

    Returns:
        An ``optax.GradientTransformationExtraArgs``.

    Raises:
        ValueError: as :func:`loro`.

    Example:
        Momentum for a direction, and the best approximation by a dense SVD for a retraction:

        >>> import jax, jax.numpy as jnp, optax
        >>> from loro_jax import LowRank, from_dense, riemannian_descent, riemannian_gradient
        >>> def dense_step(B, A, dB, dA, learning_rate, step):
        ...     W = B @ A - learning_rate * riemannian_gradient(B, A, dB, dA)
        ...     return from_dense(W, rank=B.shape[-1])
        >>> tx = riemannian_descent(0.01, optax.trace(0.9), dense_step, exact_every=10)
        >>> params = {"w": LowRank(jnp.ones((6, 2)), jnp.eye(2, 4))}
        >>> updates, state = tx.update(params, tx.init(params), params)
    """
    if isinstance(exact_every, numbers.Integral) and exact_every < 1:
        raise ValueError(f"loro: exact_every must be at least 1 (or None), but is {exact_every}.")
    if is_never(exact_every):
        exact_every = None
    if refresh not in REFRESH_CHOICES:
        raise ValueError(f"loro: refresh must be one of {REFRESH_CHOICES}, but is {refresh!r}.")
    directed = as_direction(direction)
    of_others = directed if regular_direction is None else as_direction(regular_direction)
    # Moments that the next step zeroes may be overwritten by the moves; others may not.
    zeroed = refresh in ("all", "factors")
    of_factors = directed if zeroed and exact_every is not None else directed.in_one_stage()
    own_regular = optax.with_extra_args_support(regular) if regular is not None else None

    def find(params: Any) -> list[Pair]:
        found = find_pairs(params, pairs)
        # An empty tree stands for "no parameters here" in optax.tree.map_params and partitions.
        if require_pairs and not found and jax.tree.leaves(params):
            raise ValueError(
                "loro: no low-rank pair found. Looked for LowRank nodes and for sibling leaves "
                "named 'B' (..., m, r) and 'A' (..., r, n); the tree holds "
                f"{describe_leaves(params)}. Name the pairs with pairs=..., or pass "
                "require_pairs=False for plain Adam."
            )
        return found

    def init(params: Any) -> LoroState:
        if exact_every is not None:  # approximate steps can be scaled like any other
            warn_unless_last("loro")
        params = in_arrays(params)
        factors, others = split_factors(params, find(params))
        state = LoroState(
            count=jnp.zeros([], jnp.int32),
            stale=jnp.zeros([], jnp.int32),
            fallbacks=count_of_none(factors),
            factors=of_factors.init(factors),
            regular=(own_regular or of_others).init(others),
        )
        if refresh == "transport" and not _moments_of(state.factors):
            raise ValueError(
                'loro: refresh="transport" carries moments; it needs a direction whose state has '
                f"mu (and perhaps nu), but this one's is a {type(state.factors).__name__}."
            )
        return state

    def update(
        grads: Any, state: LoroState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, LoroState]:
        if params is None:
            raise ValueError("loro: update needs the parameters: tx.update(grads, state, params).")
        params, given_grads = in_arrays(params), grads
        grads = complete(in_arrays(grads), params)
        found = find(params)
        factor_grads, other_grads = split_factors(grads, found)
        factors, others = split_factors(params, found)

        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        count = optax.safe_increment(state.count)
        exact = _is_exact(exact_every, state.count, count)
        decays = decayed_leaves(mask, params)
        settings = _StepSettings(
            rate,
            state.count,
            lr_scale,
            weight_decay,
            [decays[i] for i in sorted(_indices(found))],
            exact_step,
            *homes_on_mesh(mesh, params, [(pair.B, pair.A) for pair in found]),
        )

        factor_state, regular_state = state.factors, state.regular
        stale = state.stale > 0
        if zeroed:
            factor_state = refreshed(stale, of_factors.init(factors), factor_state, factors)
        if refresh == "all" and own_regular is None:
            regular_state = refreshed(stale, of_others.init(others), regular_state, others)

        places = places_of_factors(found)
        told = {**extra_args, "places": places} if of_factors.moves else extra_args
        carried, factor_state = of_factors.advance(factor_grads, factor_state, factors, **told)
        carried = jax.tree.map(lambda c, p: c.astype(p.dtype), carried, factors)
        fallbacks = count_of_none(factors)
        if found and exact_every is not None:
            # One branch puts moves into what is carried, the other passes it through, in place. The
            # approximate step is made outside, where it fuses with whatever applies the update.
            if refresh == "transport":
                moments = _moments_of(factor_state)
                carried, *moved, fallbacks = _either(
                    exact,
                    lambda directions, *moments_and_count: _exact_step(
                        settings, places, factors, directions, *moments_and_count
                    ),
                    lambda *unchanged: unchanged,
                    *_alike(places, carried, *moments.values()),
                    fallbacks,
                )
                factor_state = factor_state._replace(**dict(zip(moments, moved, strict=True)))
            else:
                carried, fallbacks = _either(
                    exact,
                    lambda carried, none: _exact_step(
                        settings, places, factors, of_factors.finish(carried, factor_state), none
                    ),
                    lambda *unchanged: unchanged,
                    *_alike(places, carried),
                    fallbacks,
                )
        factor_updates = _factor_updates(
            settings, places, factors, of_factors.finish(carried, factor_state), carried, exact
        )
        factor_state = of_factors.keep(factor_state, carried)

        if own_regular is None:
            other_directions, regular_state = of_others.update(
                other_grads, regular_state, others, **extra_args
            )
            flags = iter(decays[i] for i in range(len(decays)) if i not in _indices(found))
            other_updates = jax.tree.map(
                lambda u, p: (-rate * (u + weight_decay * p if next(flags) else u)).astype(p.dtype),
                other_directions,
                others,
            )
        else:
            other_updates, regular_state = own_regular.update(
                other_grads, regular_state, others, **extra_args
            )

        joined = join_factors(grads, found, factor_updates, other_updates)
        joined = with_holes_of(given_grads, joined)
        fallbacks = jnp.minimum(state.fallbacks, jnp.iinfo(jnp.int32).max - fallbacks) + fallbacks
        return joined, LoroState(
            count, exact.astype(jnp.int32), fallbacks, factor_state, regular_state
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _is_exact(every: Any, step: jax.Array, count: jax.Array) -> jax.Array:
    """Whether the step with this number, after which there will be ``count``, is exact."""
    if every is None:
        return jnp.bool_(False)
    if callable(every):
        period = every(step)
        if period is None or is_never(period):
            return jnp.bool_(False)
        return (period > 0) & (count % jnp.maximum(period, 1) == 0)
    return count % every == 0


def _either(exact: jax.Array, yes: Callable[..., Any], no: Callable[..., Any], *x: Any) -> Any:
    """One of two branches; outside of any program the one that is wanted, operation by operation.

    ``jax.lax.cond`` would compile both there, and again for each call.
    """
    if isinstance(exact, jax.core.Tracer):
        return jax.lax.cond(exact, yes, no, *x)
    return yes(*x) if exact else no(*x)


class _StepSettings(NamedTuple):
    """What both kinds of step of the factors depend on."""

    rate: Any
    step: jax.Array
    lr_scale: float | None
    weight_decay: Any
    decays: Sequence[bool]  # which factors it is for
    exact_step: Callable[..., Any]
    mesh: Any
    homes: Any

    def scale(self, B: jax.Array, A: jax.Array) -> Any:
        """The approximate step's factor: r / min(m, n) unless fixed by the user (equation 11)."""
        fixed = self.lr_scale
        return A.shape[-2] / min(B.shape[-2], A.shape[-1]) if fixed is None else fixed

    def approximate(self, p: jax.Array, direction: jax.Array, scale: Any, decays: bool) -> Any:
        """The update of a factor by equation 11."""
        direction = direction + self.weight_decay * p if decays else direction
        return (-self.rate * scale * direction).astype(p.dtype)


_Places = Sequence[tuple[int, int]]


def places_of_factors(found: Sequence[Pair]) -> _Places:
    """Where the factors of each pair stand among the leaves of a tree of factors alone."""
    indices = sorted(index for pair in found for index in (pair.B, pair.A))
    return [(indices.index(pair.B), indices.index(pair.A)) for pair in found]


def _alike(places: _Places, *trees: Any) -> tuple[Any, ...]:
    """Trees of factors; what an exact step makes of a pair, varies as both sides do."""
    columns = [jax.tree.leaves(tree) for tree in trees]
    for b, a in places:
        pair = varying_alike([(column[b], column[a]) for column in columns])
        for column, (side_B, side_A) in zip(columns, pair, strict=True):
            column[b], column[a] = side_B, side_A
    structures = [jax.tree.structure(tree) for tree in trees]
    return tuple(map(jax.tree.unflatten, structures, columns))


def _exact_step(
    settings: _StepSettings, places: _Places, factors: Any, directions: Any, *others: Any
) -> tuple[Any, ...]:
    """Moves of all pairs, trees of moments carried along with them, fallbacks.

    A pair of which one factor has no direction at all takes an approximate step: what is frozen (by
    ``jax.lax.stop_gradient``, say) stays, and its partner moves as if it were alone.
    """
    *moments, fallbacks = others

    def step(
        decays: tuple[bool, bool], outs: tuple[jax.Array, ...], ins: tuple[jax.Array, ...]
    ) -> Any:
        (B, dB, *out_moments), (A, dA, *in_moments) = outs, ins
        B_new, A_new, *count = settings.exact_step(B, A, dB, dA, settings.rate, settings.step)
        scale = settings.scale(B, A)
        keep = 1 - settings.rate * scale * settings.weight_decay
        frozen = _is_zero(dB) | _is_zero(dA)
        out, inp = (
            [
                jnp.where(
                    frozen,
                    settings.approximate(p, direction, scale, decay),
                    ((keep * new if decay else new) - p).astype(p.dtype),
                )
            ]
            for p, direction, new, decay in zip(
                (B, A), (dB, dA), (B_new, A_new), decays, strict=True
            )
        )
        if moments:
            both = [*zip(out_moments, in_moments, strict=True)]
            moved = transport_moments((B, A), (B + out[0], A + inp[0]), *both)
            for old, new in zip(both, moved, strict=True):
                out.append(jnp.where(frozen, old[0], new[0]))
                inp.append(jnp.where(frozen, old[1], new[1]))
        return tuple(out), tuple(inp), *(count or (count_of_none(out),))

    directions = jax.tree.map(lambda d, p: d.astype(p.dtype), directions, factors)
    columns = [jax.tree.leaves(tree) for tree in (factors, directions, *moments)]
    results = [[*jax.tree.leaves(like)] for like in (factors, *moments)]
    # Pairs that decay in different ways are different functions.
    for decays in dict.fromkeys((settings.decays[b], settings.decays[a]) for b, a in places):
        members = [
            i
            for i, (b, a) in enumerate(places)
            if (settings.decays[b], settings.decays[a]) == decays
        ]
        chosen = [places[i] for i in members]
        moved, count = map_pairs(
            functools.partial(step, decays),
            [
                (tuple(column[b] for column in columns), tuple(column[a] for column in columns))
                for b, a in chosen
            ],
            settings.mesh,
            settings.homes and [settings.homes[i] for i in members],
        )
        fallbacks = fallbacks + count
        for (b, a), (outs, ins) in zip(chosen, moved, strict=True):
            for leaves, out, inp in zip(results, outs, ins, strict=True):
                leaves[b], leaves[a] = out, inp
    structures = map(jax.tree.structure, (factors, *moments))
    return (*map(jax.tree.unflatten, structures, results), fallbacks)


def _is_zero(direction: jax.Array) -> jax.Array:
    """Whether nothing of the direction of a factor is left, for each of a batch."""
    return ~jnp.any(direction != 0, axis=(-2, -1), keepdims=True)


def _factor_updates(
    settings: _StepSettings,
    places: _Places,
    factors: Any,
    directions: Any,
    moves: Any,
    exact: jax.Array,
) -> list[jax.Array]:
    """Updates of the factors: exact moves as they are, directions by equation 11."""
    leaves = [jax.tree.leaves(tree) for tree in (factors, directions, moves)]
    updates = [*leaves[0]]
    for b, a in places:
        scale = settings.scale(leaves[0][b], leaves[0][a])
        for i in (b, a):
            p, direction, move = (column[i] for column in leaves)
            approximate = settings.approximate(p, direction, scale, settings.decays[i])
            updates[i] = jnp.where(exact, move, approximate)
    return updates


def _moments_of(state: Any) -> dict[str, Any]:
    """The moments that a state has of mu and nu; none without mu."""
    found = {name: getattr(state, name) for name in ("mu", "nu") if hasattr(state, name)}
    return found if "mu" in found else {}


def split_factors(tree: Any, found: Sequence[Pair]) -> tuple[Any, Any]:
    """The tree twice: with its factors alone, and with all other leaves alone."""
    leaves, structure = jax.tree.flatten(tree)
    of_pairs = _indices(found)
    hole = optax.MaskedNode()
    factors = [leaf if i in of_pairs else hole for i, leaf in enumerate(leaves)]
    others = [hole if i in of_pairs else leaf for i, leaf in enumerate(leaves)]
    return jax.tree.unflatten(structure, factors), jax.tree.unflatten(structure, others)


def join_factors(
    like: Any, found: Sequence[Pair], factors: Sequence[jax.Array], others: Any
) -> Any:
    """Puts the updates of the factors and of the other leaves together, each in their order."""
    leaves, structure = jax.tree.flatten(like)
    of_pairs = _indices(found)
    sources = {True: iter(factors), False: iter(jax.tree.leaves(others))}
    return jax.tree.unflatten(structure, [next(sources[i in of_pairs]) for i in range(len(leaves))])


def _indices(found: Sequence[Pair]) -> set[int]:
    return {index for pair in found for index in (pair.B, pair.A)}
