"""LORO as an Optax transformation.

Every step, Adam turns the gradients of all leaves into directions. Then, for the factors of each
pair W = B A:

* on most steps (approximate, equation 11) ``B -= lr s u_B`` and ``A -= lr s u_A``, with
  ``s = r / min(m, n)``: the factors' gradients are larger than the product's;
* on every K-th step (exact, Proposition 4) the product moves along the manifold of rank-r
  matrices and is retracted by its truncated SVD, with ``lr`` itself. The new factors have a new
  basis, in which the old moments mean nothing: they are refreshed.

All other leaves take their Adam step with ``lr`` on every step.

Source: Mo, Huang and Pan, ICLR 2025, Algorithm 1; details that the paper leaves out follow the
authors' code (bias correction and epsilon as in :mod:`loro_jax.adam`, the exact step fed with
Adam's directions in place of gradients, computed in float32).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from loro_jax.adam import scale_by_uncorrected_adam
from loro_jax.manifold import check_method, counted_exact_update
from loro_jax.pairs import Pair, PairsSpec, describe_leaves, find_pairs
from loro_jax.transport import transport_moments

REFRESH_CHOICES = ("all", "factors", "transport", None)


class LoroState(NamedTuple):
    """State of :func:`loro`.

    Attributes:
        count: steps taken, int32 scalar; never reset.
        stale: whether the last step was exact, so that the next begins with a refresh. (Zeroing the
            moments with the exact step itself would cost every step a copy of them: XLA can update
            a buffer in place only when its new content is also what the update is made of.)
        fallbacks: how many exact steps of single matrices the fast method left to the reference so
            far, int32 scalar; see :mod:`loro_jax.retractions`.
        factors: state of the factors' direction (Adam), with ``optax.MaskedNode`` at other leaves.
        regular: state for the other leaves, with ``optax.MaskedNode`` at the factors.
    """

    count: jax.Array  # type: ignore[assignment]  # shadows tuple.count, as in Optax
    stale: jax.Array
    fallbacks: jax.Array
    factors: Any
    regular: Any


def loro(
    learning_rate: optax.ScalarOrSchedule,
    *,
    exact_every: int | None = 500,
    refresh: str | None = "all",
    lr_scale: float | None = None,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    mu_dtype: Any | None = None,
    pairs: PairsSpec | None = None,
    require_pairs: bool = True,
    regular: optax.GradientTransformation | None = None,
    direction: optax.GradientTransformation | None = None,
    exact_method: str = "gram",
    max_move: jax.typing.ArrayLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Low-rank Riemannian optimizer for trees of (B, A) pairs and other parameters.

    It owns the learning rate, because the exact step is not linear in it; so it must be the last
    of a chain. It needs ``params`` and emits ``W_new - W_old`` for every leaf.

    Args:
        learning_rate: a number or a schedule; see :func:`loro_jax.with_restarts` for the paper's
            re-warm-up after exact steps.
        exact_every: K. Step t, counted from 0, is exact when ``(t + 1) % K == 0``. None: never.
        refresh: whose Adam state to zero behind an exact step, when the next step begins: "all"
            leaves', the "factors"', or None. A ``regular`` transformation of your own keeps its
            state in any case. "transport" keeps all state, and carries the factors' moments into
            their new basis (:mod:`loro_jax.transport`); it needs the Adam of this library.
        lr_scale: factor on the learning rate of approximate steps; None: ``r / min(m, n)`` of each
            pair. The authors' code uses ``r / hidden_size``, the same thing in a LLaMA.
        b1: decay of Adam's first moment.
        b2: decay of Adam's second moment.
        eps: added to the root of Adam's uncorrected second moment.
        weight_decay: decoupled decay; each step shrinks a leaf by ``lr * weight_decay`` (factors:
            ``lr * lr_scale * weight_decay``, on exact steps too).
        mu_dtype: dtype of Adam's first moment; None: the parameters'.
        pairs: None to find the pairs by themselves, or a spec: see :func:`loro_jax.find_pairs`.
        require_pairs: raise when the tree holds no pair. False: such a tree gets plain Adam.
        regular: transformation for all leaves that are not factors, learning rate included; None:
            the same direction as for the factors.
        direction: what turns gradients into directions, such as ``optax.scale_by_adam()``,
            ``optax.trace(0.9)`` or ``optax.identity()``; it must not scale by a learning rate.
            None: :func:`loro_jax.scale_by_uncorrected_adam` with b1, b2, eps and mu_dtype.
        exact_method: how the exact step is computed: "gram" (fast) or "svd" (the reference).
        max_move: trust region of the exact step: its size is cut so that the tangent step is at
            most ``max_move |W|`` (Frobenius). The undamped step of ill-conditioned factors can move
            a product by several times its norm. None: no bound, as in the paper.

    Returns:
        An ``optax.GradientTransformationExtraArgs``.

    Raises:
        ValueError: for an ``exact_every`` below 1, an unknown ``refresh`` or ``exact_method``;
            from ``init``, when no pair is found or a pair's shapes do not fit; from ``update``,
            without ``params``.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from loro_jax import LowRank, loro
        >>> params = {"w": LowRank(jnp.ones((6, 2)), jnp.eye(2, 4)), "b": jnp.zeros(6)}
        >>> def loss(params):
        ...     return jnp.sum((params["w"].product() + params["b"][:, None] - 3.0) ** 2)
        >>> tx = optax.chain(optax.clip_by_global_norm(1.0), loro(0.01, exact_every=10))
        >>> state = tx.init(params)
        >>> updates, state = tx.update(jax.grad(loss)(params), state, params)
        >>> bool(loss(optax.apply_updates(params, updates)) < loss(params))
        True

    References:
        Mo, Huang and Pan, `LORO: Parameter and Memory Efficient Pretraining via Low-rank
        Riemannian Optimization <https://openreview.net/forum?id=i0zzO7Hslk>`_, ICLR 2025.
    """
    if isinstance(exact_every, int) and exact_every < 1:
        raise ValueError(f"loro: exact_every must be at least 1 (or None), but is {exact_every}.")
    if refresh not in REFRESH_CHOICES:
        raise ValueError(f"loro: refresh must be one of {REFRESH_CHOICES}, but is {refresh!r}.")
    check_method(exact_method, "loro")
    if refresh == "transport" and direction is not None:
        raise ValueError(
            'loro: refresh="transport" carries Adam\'s moments; it takes no direction.'
        )
    if direction is None:
        direction = scale_by_uncorrected_adam(b1, b2, eps, mu_dtype)
    directed = optax.with_extra_args_support(direction)
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
        factors, others = _split(params, find(params))
        return LoroState(
            count=jnp.zeros([], jnp.int32),
            stale=jnp.bool_(False),
            fallbacks=jnp.zeros([], jnp.int32),
            factors=directed.init(factors),
            regular=(own_regular or directed).init(others),
        )

    def update(
        grads: Any, state: LoroState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, LoroState]:
        if params is None:
            raise ValueError("loro: update needs the parameters: tx.update(grads, state, params).")
        found = find(params)
        factor_grads, other_grads = _split(grads, found)
        factors, others = _split(params, found)

        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        count = optax.safe_increment(state.count)
        exact = jnp.bool_(False) if exact_every is None else count % exact_every == 0
        settings = _StepSettings(rate, lr_scale, weight_decay, exact_method, max_move)

        factor_state, regular_state = state.factors, state.regular
        if refresh in ("all", "factors"):
            factor_state = _select(state.stale, directed.init(factors), factor_state)
        if refresh == "all" and own_regular is None:
            regular_state = _select(state.stale, directed.init(others), regular_state)

        factor_directions, factor_state = directed.update(
            factor_grads, factor_state, factors, **extra_args
        )
        pairs_of_params = _pairs_of(params, found)
        steps = _directions_of(pairs_of_params, factor_directions, found)
        fallbacks = jnp.zeros([], jnp.int32)
        if found and exact_every is not None:
            # One branch takes directions to moves, the other passes them through: they are all that
            # is stored for it, and the approximate step fuses with whatever applies the update. The
            # barrier keeps XLA from moving Adam into a branch, where it would run on one core.
            steps, fallbacks = jax.lax.cond(
                exact,
                lambda directions: _exact_step(pairs_of_params, directions, settings),
                lambda directions: (directions, jnp.zeros([], jnp.int32)),
                jax.lax.optimization_barrier(steps),
            )
        updates = _factor_updates(pairs_of_params, steps, exact, settings)
        if refresh == "transport" and found and exact_every is not None:
            factor_state = _transported(exact, factor_state, pairs_of_params, steps, found)

        if own_regular is None:
            other_directions, regular_state = directed.update(
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

        joined = _join(grads, found, updates, jax.tree.leaves(other_updates))
        fallbacks = jnp.minimum(state.fallbacks, jnp.iinfo(jnp.int32).max - fallbacks) + fallbacks
        return joined, LoroState(count, exact, fallbacks, factor_state, regular_state)

    return optax.GradientTransformationExtraArgs(init, update)


class _StepSettings(NamedTuple):
    """What both kinds of step of the factors depend on."""

    rate: Any
    lr_scale: float | None
    weight_decay: float
    exact_method: str
    max_move: Any


# (B, A), or something of theirs.
_Factors = tuple[jax.Array, jax.Array]


def _pairs_of(params: Any, found: Sequence[Pair]) -> list[_Factors]:
    """The factors of each pair."""
    leaves = jax.tree.leaves(params)
    return [(leaves[pair.B], leaves[pair.A]) for pair in found]


def _directions_of(
    pairs: Sequence[_Factors], factor_directions: Any, found: Sequence[Pair]
) -> list[_Factors]:
    """Their directions, in their dtypes. ``factor_directions`` has leaves for factors alone."""
    indices = sorted(index for pair in found for index in (pair.B, pair.A))
    by_index = dict(zip(indices, jax.tree.leaves(factor_directions), strict=True))
    return [
        (by_index[pair.B].astype(B.dtype), by_index[pair.A].astype(A.dtype))
        for pair, (B, A) in zip(found, pairs, strict=True)
    ]


def _factor_updates(
    pairs: Sequence[_Factors], steps: Sequence[_Factors], exact: jax.Array, settings: _StepSettings
) -> list[_Factors]:
    """Updates of the factors: exact moves as they are, directions by equation 11."""

    def update(p: jax.Array, step: jax.Array, scale: Any) -> jax.Array:
        approximate = -settings.rate * scale * (step + settings.weight_decay * p)
        return jnp.where(exact, step, approximate.astype(p.dtype))

    updates = []
    for (B, A), (step_B, step_A) in zip(pairs, steps, strict=True):
        scale = _pair_lr_scale(B, A, settings.lr_scale)
        updates.append((update(B, step_B, scale), update(A, step_A, scale)))
    return updates


def _exact_step(
    pairs: Sequence[_Factors], directions: Sequence[_Factors], settings: _StepSettings
) -> tuple[list[_Factors], jax.Array]:
    """Moves of all pairs by Proposition 4, those of one shape in one batch; and the fallbacks.

    A model has few shapes and many pairs: batches compile once a shape, and keep a GPU busy with
    matrices that are small each.
    """
    groups: dict[Any, list[int]] = {}
    for i, (B, A) in enumerate(pairs):
        groups.setdefault((B.shape[-2:], A.shape[-1], B.dtype, A.dtype), []).append(i)
    moves: dict[int, _Factors] = {}
    fallbacks = jnp.zeros([], jnp.int32)
    for members in groups.values():
        # Leading axes flattened, pairs behind one another: (pairs x layers, rows, columns).
        Bs, As, dBs, dAs = (
            jnp.concatenate([x.reshape(-1, *x.shape[-2:]) for x in side])
            for side in zip(*(pairs[i] + directions[i] for i in members), strict=True)
        )
        B_new, A_new, fallen = counted_exact_update(
            Bs,
            As,
            dBs,
            dAs,
            settings.rate,
            method=settings.exact_method,
            max_move=settings.max_move,
            where="loro",
        )
        fallbacks += fallen
        start = 0
        for i in members:
            B, A = pairs[i]
            stop = start + math.prod(B.shape[:-2])
            scale = _pair_lr_scale(B, A, settings.lr_scale)
            keep = 1 - settings.rate * scale * settings.weight_decay
            moves[i] = (
                (keep * B_new[start:stop].reshape(B.shape) - B).astype(B.dtype),
                (keep * A_new[start:stop].reshape(A.shape) - A).astype(A.dtype),
            )
            start = stop
    return [moves[i] for i in range(len(pairs))], fallbacks


def _pair_lr_scale(B: jax.Array, A: jax.Array, lr_scale: float | None) -> Any:
    """The approximate step's factor: r / min(m, n) unless fixed by the user (equation 11)."""
    return A.shape[-2] / min(B.shape[-2], A.shape[-1]) if lr_scale is None else lr_scale


def _transported(
    exact: jax.Array,
    state: Any,
    pairs: Sequence[_Factors],
    moves: Sequence[_Factors],
    found: Sequence[Pair],
) -> Any:
    """Adam's state of the factors, its moments carried into the new basis on exact steps."""
    structure = jax.tree.structure(state.mu)
    # Each pair's two places among the leaves of the state, which has leaves for factors alone.
    indices = sorted(index for pair in found for index in (pair.B, pair.A))
    places = [(indices.index(pair.B), indices.index(pair.A)) for pair in found]

    def transport(moments: tuple[list[jax.Array], list[jax.Array]]) -> Any:
        mu, nu = list(moments[0]), list(moments[1])
        for (b, a), (B, A), (move_B, move_A) in zip(places, pairs, moves, strict=True):
            (mu[b], mu[a]), (nu[b], nu[a]) = transport_moments(
                (B, A), (B + move_B, A + move_A), (mu[b], mu[a]), (nu[b], nu[a])
            )
        return mu, nu

    moments = (jax.tree.leaves(state.mu), jax.tree.leaves(state.nu))
    mu, nu = jax.lax.cond(exact, transport, lambda moments: moments, moments)
    return state._replace(
        mu=jax.tree.unflatten(structure, mu), nu=jax.tree.unflatten(structure, nu)
    )


def _select(first: jax.Array, one: Any, other: Any) -> Any:
    """One of two states of the same structure."""
    return jax.tree.map(lambda x, y: jnp.where(first, x, y), one, other)


def _split(tree: Any, found: Sequence[Pair]) -> tuple[Any, Any]:
    """The tree twice: with its factors alone, and with all other leaves alone."""
    leaves, structure = jax.tree.flatten(tree)
    of_pairs = {index for pair in found for index in (pair.B, pair.A)}
    hole = optax.MaskedNode()
    factors = [leaf if i in of_pairs else hole for i, leaf in enumerate(leaves)]
    others = [hole if i in of_pairs else leaf for i, leaf in enumerate(leaves)]
    return jax.tree.unflatten(structure, factors), jax.tree.unflatten(structure, others)


def _join(
    like: Any, found: Sequence[Pair], updates: Sequence[_Factors], others: Sequence[jax.Array]
) -> Any:
    """Puts the updates of the pairs and of the other leaves (in their order) together."""
    leaves, structure = jax.tree.flatten(like)
    joined = dict(zip((pair.B for pair in found), (B for B, _ in updates), strict=True))
    joined |= dict(zip((pair.A for pair in found), (A for _, A in updates), strict=True))
    rest = iter(others)
    return jax.tree.unflatten(
        structure, [joined[i] if i in joined else next(rest) for i in range(len(leaves))]
    )
