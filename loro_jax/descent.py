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

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from loro_jax.direction import Direction, as_direction
from loro_jax.division import map_pairs
from loro_jax.pairs import Pair, PairsSpec, describe_leaves, find_pairs
from loro_jax.transport import transport_moments

REFRESH_CHOICES = ("all", "factors", "transport", None)


class LoroState(NamedTuple):
    """State of :func:`loro` and :func:`riemannian_descent`.

    Attributes:
        count: steps taken, int32 scalar; never reset.
        stale: whether the last step was exact and the next begins with a refresh, so that what the
            states below hold for the refreshed leaves has no meaning any more. (Zeroing the moments
            with the exact step itself would cost every step a copy of them: XLA can update a
            buffer in place only when its new content is also what the update is made of.)
        fallbacks: how many exact steps of single matrices the chosen method left to another so
            far, int32 scalar; see :mod:`loro_jax.retractions`.
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
    if isinstance(exact_every, int) and exact_every < 1:
        raise ValueError(f"loro: exact_every must be at least 1 (or None), but is {exact_every}.")
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
        factors, others = split_factors(params, find(params))
        state = LoroState(
            count=jnp.zeros([], jnp.int32),
            stale=jnp.bool_(False),
            fallbacks=jnp.zeros([], jnp.int32),
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
        found = find(params)
        factor_grads, other_grads = split_factors(grads, found)
        factors, others = split_factors(params, found)

        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        count = optax.safe_increment(state.count)
        exact = _is_exact(exact_every, state.count, count)
        settings = _StepSettings(
            rate, state.count, lr_scale, weight_decay, exact_step, *_places_on(mesh, params, found)
        )

        factor_state, regular_state = state.factors, state.regular
        if zeroed:
            factor_state = _select(state.stale, of_factors.init(factors), factor_state)
        if refresh == "all" and own_regular is None:
            regular_state = _select(state.stale, of_others.init(others), regular_state)

        places = places_of_factors(found)
        told = {**extra_args, "places": places} if of_factors.moves else extra_args
        carried, factor_state = of_factors.advance(factor_grads, factor_state, factors, **told)
        carried = jax.tree.map(lambda c, p: c.astype(p.dtype), carried, factors)
        fallbacks = jnp.zeros([], jnp.int32)
        if found and exact_every is not None:
            # One branch puts moves into what is carried, the other passes it through, in place. The
            # approximate step is made outside, where it fuses with whatever applies the update.
            if refresh == "transport":
                moments = _moments_of(factor_state)
                carried, *moved, fallbacks = jax.lax.cond(
                    exact,
                    lambda directions, *moments: _exact_step(
                        settings, places, factors, directions, *moments
                    ),
                    lambda *unchanged: (*unchanged, jnp.zeros([], jnp.int32)),
                    *(carried, *moments.values()),
                )
                factor_state = factor_state._replace(**dict(zip(moments, moved, strict=True)))
            else:
                carried, fallbacks = jax.lax.cond(
                    exact,
                    lambda carried: _exact_step(
                        settings, places, factors, of_factors.finish(carried, factor_state)
                    ),
                    lambda carried: (carried, jnp.zeros([], jnp.int32)),
                    carried,
                )
        factor_updates = _factor_updates(
            settings, places, factors, of_factors.finish(carried, factor_state), carried, exact
        )
        factor_state = of_factors.keep(factor_state, carried)

        if own_regular is None:
            other_directions, regular_state = of_others.update(
                other_grads, regular_state, others, **extra_args
            )
            other_updates = jax.tree.map(
                lambda u, p: (-rate * (u + weight_decay * p)).astype(p.dtype),
                other_directions,
                others,
            )
        else:
            other_updates, regular_state = own_regular.update(
                other_grads, regular_state, others, **extra_args
            )

        joined = join_factors(grads, found, factor_updates, other_updates)
        fallbacks = jnp.minimum(state.fallbacks, jnp.iinfo(jnp.int32).max - fallbacks) + fallbacks
        return joined, LoroState(count, exact, fallbacks, factor_state, regular_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _is_exact(every: Any, step: jax.Array, count: jax.Array) -> jax.Array:
    """Whether the step with this number, after which there will be ``count``, is exact."""
    if every is None:
        return jnp.bool_(False)
    if callable(every):
        period = every(step)
        return (period > 0) & (count % jnp.maximum(period, 1) == 0)
    return count % every == 0


class _StepSettings(NamedTuple):
    """What both kinds of step of the factors depend on."""

    rate: Any
    step: jax.Array
    lr_scale: float | None
    weight_decay: Any
    exact_step: Callable[..., Any]
    mesh: Any
    homes: Any

    def scale(self, B: jax.Array, A: jax.Array) -> Any:
        """The approximate step's factor: r / min(m, n) unless fixed by the user (equation 11)."""
        fixed = self.lr_scale
        return A.shape[-2] / min(B.shape[-2], A.shape[-1]) if fixed is None else fixed


_Places = Sequence[tuple[int, int]]


def places_of_factors(found: Sequence[Pair]) -> _Places:
    """Where the factors of each pair stand among the leaves of a tree of factors alone."""
    indices = sorted(index for pair in found for index in (pair.B, pair.A))
    return [(indices.index(pair.B), indices.index(pair.A)) for pair in found]


def _places_on(mesh: Any, params: Any, found: Sequence[Pair]) -> tuple[Any, Any]:
    """The mesh, and where on it the factors of each pair lie if ``mesh`` says so."""
    if mesh is None or isinstance(mesh, jax.sharding.Mesh | jax.sharding.AbstractMesh):
        return mesh, None
    shardings = jax.tree.leaves(mesh)
    expected = len(jax.tree.leaves(params))
    if len(shardings) != expected:
        raise ValueError(
            f"loro: mesh must be a mesh, or a tree of {expected} shardings like the parameters, "
            f"but has {len(shardings)} leaves."
        )
    homes = [(shardings[pair.B], shardings[pair.A]) for pair in found]
    return shardings[0].mesh, homes


def _exact_step(
    settings: _StepSettings, places: _Places, factors: Any, directions: Any, *moments: Any
) -> tuple[Any, ...]:
    """Moves of all pairs, trees of moments carried along with them, fallbacks."""

    def step(outs: tuple[jax.Array, ...], ins: tuple[jax.Array, ...]) -> Any:
        (B, dB, *out_moments), (A, dA, *in_moments) = outs, ins
        B_new, A_new, *count = settings.exact_step(B, A, dB, dA, settings.rate, settings.step)
        keep = 1 - settings.rate * settings.scale(B, A) * settings.weight_decay
        out = [(keep * B_new - B).astype(B.dtype)]
        inp = [(keep * A_new - A).astype(A.dtype)]
        if moments:
            both = zip(out_moments, in_moments, strict=True)
            for out_moment, in_moment in transport_moments((B, A), (B + out[0], A + inp[0]), *both):
                out.append(out_moment)
                inp.append(in_moment)
        return tuple(out), tuple(inp), *(count or (jnp.zeros([], jnp.int32),))

    directions = jax.tree.map(lambda d, p: d.astype(p.dtype), directions, factors)
    columns = [jax.tree.leaves(tree) for tree in (factors, directions, *moments)]
    pairs = [
        (tuple(column[b] for column in columns), tuple(column[a] for column in columns))
        for b, a in places
    ]
    results, fallbacks = map_pairs(step, pairs, settings.mesh, settings.homes)
    trees = []
    for i, like in enumerate((factors, *moments)):
        leaves = [*jax.tree.leaves(like)]
        for (b, a), (outs, ins) in zip(places, results, strict=True):
            leaves[b], leaves[a] = outs[i], ins[i]
        trees.append(jax.tree.unflatten(jax.tree.structure(like), leaves))
    return (*trees, fallbacks)


def _factor_updates(
    settings: _StepSettings,
    places: _Places,
    factors: Any,
    directions: Any,
    moves: Any,
    exact: jax.Array,
) -> list[jax.Array]:
    """Updates of the factors: exact moves as they are, directions by equation 11."""

    def update(p: jax.Array, direction: jax.Array, move: jax.Array, scale: Any) -> jax.Array:
        approximate = -settings.rate * scale * (direction + settings.weight_decay * p)
        return jnp.where(exact, move, approximate.astype(p.dtype))

    leaves = [jax.tree.leaves(tree) for tree in (factors, directions, moves)]
    updates = [*leaves[0]]
    for b, a in places:
        scale = settings.scale(leaves[0][b], leaves[0][a])
        for i in (b, a):
            updates[i] = update(leaves[0][i], leaves[1][i], leaves[2][i], scale)
    return updates


def _moments_of(state: Any) -> dict[str, Any]:
    """The moments that a state has of mu and nu; none without mu."""
    found = {name: getattr(state, name) for name in ("mu", "nu") if hasattr(state, name)}
    return found if "mu" in found else {}


def _select(first: jax.Array, one: Any, other: Any) -> Any:
    """One of two states of the same structure."""
    return jax.tree.map(lambda x, y: jnp.where(first, x, y), one, other)


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
