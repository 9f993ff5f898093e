"""IncreLoRA: adapters start with one rank each, and the most important ones get further ranks.

An adapter is ``dW = s B diag(E) A`` with room for r ranks. One is open at first. Every so many
steps the few adapters of the highest scores open one more, until the budget is spent: the score
is the product of two exponential averages, of ``sum |dW o G| / sqrt(m n)`` for the gradient G of
dW, and of its deviation from the first (:class:`loro_jax.layers.adapters.increlora.IncreLora` hands
it over).

Until the budget is spent, each adapter also has a reserve: the next triplets, whose E is 1e-5 and
fixed, so that B and A are trained ahead. A rank that opens comes from there, and changes the output
by no more than what was there. Parts that join have a learning-rate curve of their own, from a
warm-up to the end of the run. As in AdaLoRA a penalty keeps triplets orthonormal; its gradient is
added here, to gradients that may have been clipped before.

Source: Zhang et al., "IncreLoRA: Incremental Parameter Allocation Method for Parameter-Efficient
Fine-tuning", 2023 (arXiv 2308.12043), and the authors' code. Differences from it:

* the open and reserved triplets of an adapter are orthonormal to each other, as in the paper; the
  code takes the penalty of each part that joined, apart from the others;
* the last round opens no more ranks than the budget has; there it may exceed it;
* Adam's correction of its first moments counts from the run's first step also for parts that join
  later: their first steps are up to three times larger, of a small rate while they warm up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from loro_jax.peers.triplets import (
    Adapters,
    Triplet,
    adapters_of,
    on_all,
    penalised,
    places_by_size,
    smoothed,
)
from loro_jax.schedules import value_at

Array = jax.Array

# E of triplets in reserve.
RESERVE = 1e-5
# Scores are handed over in this unit, too small to count in the norm of all gradients.
SCORE_UNIT = 2.0**-40


class Growth(NamedTuple):
    """What is known of an adapter; leading axes (...) are layers.

    Attributes:
        rank: number of open triplets, the first ones, int32 (...).
        joined: step at which B and A of a triplet began to be trained, int32 (..., r).
        opened: step at which its E did.
        mean: average score (...).
        spread: average deviation of the score (...).
    """

    rank: Array
    joined: Array
    opened: Array
    mean: Array
    spread: Array


class IncreLoraState(NamedTuple):
    """State of :func:`increlora`.

    Attributes:
        count: steps taken, int32 scalar.
        adapters: growth of each adapter.
        inner: state of the optimizer.
    """

    count: Array  # type: ignore[assignment]  # shadows tuple.count, as in Optax
    adapters: tuple[Growth, ...]
    inner: Any


def increlora(
    optimizer: optax.GradientTransformation,
    total_steps: int,
    *,
    target: float = 0.25,
    grow_from: int = 1_000,
    grow_every: int = 1_000,
    top: int = 2,
    ranks_per_round: int = 1,
    orthogonality: float = 0.1,
    b_importance: float = 0.85,
    b_uncertainty: float = 0.85,
    learning_rate: optax.ScalarOrSchedule = 1.0,
    warmup_steps: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Opens ranks of adapters that another optimizer trains.

    Args:
        optimizer: trains all parameters, its learning rate included; AdamW in the paper.
        total_steps: T, length of the run.
        target: ranks at the end, a share of those that all adapters have room for.
        grow_from: last step, from 0, before ranks are opened.
        grow_every: steps between two rounds.
        top: adapters that get ranks in a round.
        ranks_per_round: ranks that each of them gets, and that are in reserve.
        orthogonality: weight of the penalty.
        b_importance: decay of the average score.
        b_uncertainty: decay of its average deviation.
        learning_rate: the optimizer's learning rate, from which the curves of parts that join
            later are made.
        warmup_steps: length of its warm-up, and theirs.

    Returns:
        An ``optax.GradientTransformationExtraArgs``. It must be the last of a chain.

    Raises:
        ValueError: from ``init``, if there is no adapter, or none with a ``score``.

    Example:
        >>> up = {"B": jnp.ones((3, 2)), "A": jnp.ones((2, 3)), "E": jnp.zeros(2), "score": 0.0}
        >>> tx = increlora(optax.sgd(0.1), 4, target=1.0, grow_from=0, grow_every=1)
        >>> params = jax.tree.map(jnp.asarray, up)
        >>> state = tx.init(params)
        >>> grads = jax.tree.map(jnp.ones_like, params)
        >>> for _ in range(2):
        ...     print(int(state.adapters[0].rank), params["E"].tolist())
        ...     updates, state = tx.update(grads, state, params)
        ...     params = optax.apply_updates(params, updates)
        1 [0.0, 0.0]
        1 [-0.10000000149011612, 9.999999747378752e-06]
        >>> int(state.adapters[0].rank)
        2
    """
    inner = optax.with_extra_args_support(optimizer)
    budget = _Budget(target, grow_from, grow_every, top, ranks_per_round)

    def init(params: Any) -> IncreLoraState:
        found = _with_scores(adapters_of(params, "increlora")).take(params)
        growth = tuple(map(_beginning, found))
        return IncreLoraState(jnp.zeros([], jnp.int32), growth, inner.init(params))

    def update(
        grads: Any, state: IncreLoraState, params: Any = None, **extra: Any
    ) -> tuple[Any, IncreLoraState]:
        if params is None:
            raise ValueError("increlora: update needs params, which it opens parts of.")
        step, old = state.count, state.adapters
        adapters = _with_scores(adapters_of(params, "increlora"))
        own = adapters.take(params)
        # The reserve is made at the first step, after its gradient.
        reserve = jnp.where((step > 0) & budget.left(old), ranks_per_round, 0)
        trained = [_first(g.rank + reserve, one) for g, one in zip(old, own, strict=True)]
        gradients = [
            G._replace(E=jnp.where(_first(g.rank, one), G.E, 0))
            for G, g, one in zip(adapters.take(grads), old, own, strict=True)
        ]
        gradients = penalised(gradients, own, orthogonality, trained)
        new = budget.grown(step, old, _scores(adapters, grads), b_importance, b_uncertainty)
        updates, inner_state = inner.update(
            _without_scores(adapters, adapters.put(grads, gradients)), state.inner, params, **extra
        )
        reserve = jnp.where(budget.left(new), ranks_per_round, 0)
        moves, growth = [], []
        for move, one, before, after, had in zip(
            adapters.take(updates), own, old, new, trained, strict=True
        ):
            after = after._replace(
                joined=jnp.where(_first(after.rank + reserve, one) & ~had, step, before.joined),
                opened=jnp.where(
                    _first(after.rank, one) & ~_first(before.rank, one), step, before.opened
                ),
            )
            growth.append(after)
            rates = [
                _relative_rate(step, since, total_steps, learning_rate, warmup_steps)
                for since in (before.joined, before.opened)
            ]
            moves.append(_moves(move, one, before.rank, after.rank, reserve, rates))
        count = optax.safe_increment(step)
        return adapters.put(updates, moves), IncreLoraState(count, tuple(growth), inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


class _Budget(NamedTuple):
    """When ranks are opened, and how many."""

    target: float
    grow_from: int
    grow_every: int
    top: int
    ranks_per_round: int

    def remaining(self, growth: Sequence[Growth]) -> Array:
        """Returns the number of ranks that are still to be opened."""
        whole = round(self.target * sum(one.joined.size for one in growth))
        return jnp.maximum(whole - sum(jnp.sum(one.rank) for one in growth), 0)

    def left(self, growth: Sequence[Growth]) -> Array:
        """Returns whether ranks are still to be opened."""
        return self.remaining(growth) > 0

    def grown(
        self,
        step: Array,
        growth: Sequence[Growth],
        scores: Sequence[Array],
        b_importance: float,
        b_uncertainty: float,
    ) -> list[Growth]:
        """Returns growth with new averages of the scores, and new ranks if it is time."""
        remaining = self.remaining(growth)
        measured = []
        for one, score in zip(growth, scores, strict=True):
            new = smoothed(one.mean, one.spread, score, b_importance, b_uncertainty)
            mean, spread = (
                jnp.where(remaining > 0, a, b).astype(b.dtype)
                for a, b in zip(new, (one.mean, one.spread), strict=True)
            )
            measured.append(one._replace(mean=mean, spread=spread))
        room = jnp.concatenate([(one.joined.shape[-1] - one.rank).ravel() for one in growth])
        given = on_all(
            lambda values: opened_ranks(values, room, remaining, self.top, self.ranks_per_round),
            [one.mean * one.spread for one in measured],
        )
        due = (step > self.grow_from) & (step % self.grow_every == 0)
        return [
            one._replace(rank=one.rank + jnp.where(due, more, 0))
            for one, more in zip(measured, given, strict=True)
        ]


def opened_ranks(
    scores: Array, room: Array, remaining: Array, top: int, ranks_per_round: int
) -> Array:
    """Returns how many ranks each adapter opens in a round.

    Args:
        scores: importance of each adapter, (k,).
        room: ranks that it can still open, int32 (k,).
        remaining: ranks that all of them can still open.
        top: number of adapters that open ranks.
        ranks_per_round: ranks that each of them opens, if there is room.

    Example:
        >>> room = jnp.array([4, 0, 4, 4])
        >>> opened_ranks(jnp.array([1.0, 9.0, 3.0, 2.0]), room, 3, 2, 2).tolist()
        [0, 0, 2, 1]
    """
    places = places_by_size(jnp.where(room > 0, scores, -jnp.inf))
    allowed = jnp.clip(remaining - places * ranks_per_round, 0, ranks_per_round)
    return jnp.where(places < top, jnp.minimum(allowed, room), 0).astype(jnp.int32)


def _beginning(one: Triplet) -> Growth:
    shape = one.E.shape
    zeros = jnp.zeros(shape[:-1], one.E.dtype)
    # Separate arrays: a training step may donate them.
    joined, opened = jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.int32)
    return Growth(jnp.ones(shape[:-1], jnp.int32), joined, opened, zeros, jnp.copy(zeros))


def _first(count: Array, one: Triplet) -> Array:
    """Returns which triplets are among the first ones, bool (..., r)."""
    return jnp.arange(one.E.shape[-1]) < jnp.asarray(count)[..., None]


def _moves(
    move: Triplet, one: Triplet, old: Array, new: Array, reserve: Array, rates: list[Array]
) -> Triplet:
    """Returns the updates of an adapter: scaled, and E of what is not open set to its value."""
    kept = jnp.where(_first(new + reserve, one), RESERVE, 0).astype(one.E.dtype)
    of_E = jnp.where(_first(old, one), (move.E * rates[1]).astype(one.E.dtype), kept - one.E)
    of_B = (move.B * rates[0][..., None, :]).astype(move.B.dtype)
    return Triplet(of_B, (move.A * rates[0][..., :, None]).astype(move.A.dtype), of_E)


def _relative_rate(
    step: Array,
    since: Array,
    total_steps: int,
    learning_rate: optax.ScalarOrSchedule,
    warmup_steps: int,
) -> Array:
    """Returns the learning rate of parts that joined at a step, relative to the present one.

    Their curve is the schedule's: its warm-up, and then the rest of it in the time that is left.
    """
    if not callable(learning_rate):
        return jnp.ones(since.shape)
    age = step - since
    left = jnp.maximum(total_steps - since - warmup_steps, 1)
    after = warmup_steps + (age - warmup_steps) * (total_steps - warmup_steps) / left
    place = jnp.where(age < warmup_steps, age, jnp.minimum(after, total_steps))
    # Exactly 1 for what was there from the start.
    place = jnp.where(since == 0, step, place)
    now = jnp.asarray(value_at(learning_rate, step))
    own = jnp.vectorize(learning_rate)(place)
    return jnp.where(since == 0, 1.0, own / jnp.where(now == 0, 1.0, now))


def _with_scores(adapters: Adapters) -> Adapters:
    if None in adapters.scores:
        raise ValueError(
            "increlora: expected a parameter named score beside B, A and E, as in an adapter of "
            "the kind 'increlora', but one has none."
        )
    return adapters


def _scores(adapters: Adapters, grads: Any) -> list[Array]:
    leaves = jax.tree.leaves(grads)
    return [leaves[i] / SCORE_UNIT for i in adapters.scores if i is not None]


def _without_scores(adapters: Adapters, grads: Any) -> Any:
    leaves, structure = jax.tree.flatten(grads)
    cleared = [jnp.zeros_like(x) if i in adapters.scores else x for i, x in enumerate(leaves)]
    return jax.tree.unflatten(structure, cleared)
