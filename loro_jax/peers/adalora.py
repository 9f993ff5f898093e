"""AdaLoRA: the least important ranks of all adapters are pruned while they are trained.

An adapter is ``dW = s B diag(E) A``. A rank i is as important as its triplet: the importance of
E_i, plus the mean importances of row i of A and of column i of B. The importance of an entry p is
the product of two exponential averages: that of ``I = |p dL/dp|``, and that of its deviation from
the first. All ranks of all adapters compete for a budget, which falls from r for each matrix to its
target along a cubic curve; whenever it is due, E of all others is set to zero. Between two prunes
they are trained on, and may return. In the last part of the run importances are no longer updated,
and E of the pruned ones is zero after every step.

A penalty on ``|A A^T - I|_F`` and ``|B^T B - I|_F``, the mean over all matrices, keeps the triplets
comparable. Its gradient is added here, to gradients that may have been clipped before: their norm,
and the loss, are the model's alone.

Source: Zhang et al., "Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", ICLR 2023
(arXiv 2303.10512), and the authors' code. Differences from it:

* the sensitivity I is that of the weights that the gradient belongs to, as in the paper's
  algorithm 1; the code multiplies the gradient by the weights after the step, and PEFT, too;
* exactly the budget's number of ranks is kept, the first ones of equal scores; the code drops all
  that are equal to the threshold;
* the lengths of the first and the last part, and the target, are shares; there numbers of steps
  and a rank (for MNLI 9% and 58% of the run; a rank of 12 falls to 8 in the library's example).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from loro_jax.peers.triplets import (
    Triplet,
    adapters_of,
    on_all,
    penalised,
    places_by_size,
    smoothed,
)

Array = jax.Array


class AdaLoraState(NamedTuple):
    """State of :func:`adalora`.

    Attributes:
        count: steps taken, int32 scalar.
        kept: ranks that the last prune has kept, of all adapters; all of them before, int32 scalar.
        mean: average sensitivities of B, A and E, in trees like the parameters.
        spread: averages of their deviations.
        inner: state of the optimizer.
    """

    count: Array  # type: ignore[assignment]  # shadows tuple.count, as in Optax
    kept: Array
    mean: Any
    spread: Any
    inner: Any


class Budget(NamedTuple):
    """The number of ranks that all adapters may have, as a function of the step.

    Attributes:
        total: number of all ranks.
        target: the number at the end.
        first: last step, from 0, before the budget falls.
        last: step at which it is the target.
        every: steps between two prunes.
    """

    total: int
    target: int
    first: int
    last: int
    every: int

    def at(self, step: Array) -> tuple[Array, Array]:
        """Returns the budget at a step, from 0, and whether ranks are pruned after it."""
        left = 1 - (step - self.first) / max(self.last - self.first, 1)
        falling = self.target + (self.total - self.target) * left**3
        # Truncated, as in the authors' code.
        now = jnp.where(step <= self.first, self.total, falling).astype(jnp.int32)
        done = step > self.last
        due = (step > self.first) & (done | (step % self.every == 0))
        return jnp.where(done, self.target, now), due


def adalora(
    optimizer: optax.GradientTransformation,
    total_steps: int,
    *,
    target: float = 2 / 3,
    initial: float = 0.1,
    final: float = 0.5,
    prune_every: int = 100,
    orthogonality: float = 0.1,
    b_importance: float = 0.85,
    b_uncertainty: float = 0.85,
) -> optax.GradientTransformationExtraArgs:
    """Prunes ranks of adapters that another optimizer trains.

    Args:
        optimizer: trains all parameters, its learning rate included; AdamW in the paper.
        total_steps: T, length of the run.
        target: share of the ranks that are kept at the end.
        initial: share of the run before the first prune.
        final: share of the run after the last change of the budget.
        prune_every: steps between two prunes.
        orthogonality: weight of the penalty (PEFT: 0.5).
        b_importance: decay of the average sensitivity.
        b_uncertainty: decay of its average deviation.

    Returns:
        An ``optax.GradientTransformationExtraArgs``. It must be the last of a chain: the updates of
        pruned entries of E are the entries, negated.

    Raises:
        ValueError: if ``initial + final`` is not below 1; from ``init``, if there is no adapter.

    Example:
        >>> params = {"B": jnp.ones((3, 2)), "A": jnp.ones((2, 3)), "E": jnp.array([1.0, 2.0])}
        >>> tx = adalora(optax.sgd(0.1), 2, target=0.5, initial=0.0, final=0.5, prune_every=1)
        >>> state = tx.init(params)
        >>> grads = jax.tree.map(jnp.ones_like, params)
        >>> for _ in range(2):
        ...     updates, state = tx.update(grads, state, params)
        ...     params = optax.apply_updates(params, updates)
        >>> (params["E"] != 0).tolist()
        [False, True]
    """
    if not 0 <= initial + final < 1:
        raise ValueError(
            f"adalora: initial + final must be below 1, so that ranks can be pruned between, but "
            f"initial is {initial} and final is {final}."
        )
    inner = optax.with_extra_args_support(optimizer)

    def init(params: Any) -> AdaLoraState:
        return _beginning(params, inner.init(params))

    def update(
        grads: Any, state: AdaLoraState, params: Any = None, **extra: Any
    ) -> tuple[Any, AdaLoraState]:
        if params is None:
            raise ValueError("adalora: update needs params, whose importance it measures.")
        adapters = adapters_of(params, "adalora")
        own = adapters.take(params)
        gradients = penalised(adapters.take(grads), own, orthogonality)
        total = sum(one.E.size for one in own)
        first, last = round(initial * total_steps), total_steps - round(final * total_steps)
        budget = Budget(total, max(round(target * total), 1), first, last, prune_every)
        averages = zip(adapters.take(state.mean), adapters.take(state.spread), strict=True)
        pairs = [
            _measured(*average, one, G, state.count < budget.last, b_importance, b_uncertainty)
            for average, one, G in zip(averages, own, gradients, strict=True)
        ]
        means, spreads = [mean for mean, _ in pairs], [spread for _, spread in pairs]
        grads = adapters.put(grads, gradients)
        updates, inner_state = inner.update(grads, state.inner, params, **extra)
        allowed, due = budget.at(state.count)
        # Scores are only computed when they are needed.
        live = jax.lax.cond(
            due,
            lambda: live_ranks(scores(means, spreads), allowed),
            lambda: [jnp.ones(one.E.shape, bool) for one in own],
        )
        moves = [
            Triplet(None, None, jnp.where(mask, move.E, -one.E))
            for mask, move, one in zip(live, adapters.take(updates), own, strict=True)
        ]
        count = optax.safe_increment(state.count)
        mean, spread = adapters.put(state.mean, means), adapters.put(state.spread, spreads)
        kept = jnp.where(due, allowed, state.kept)
        return adapters.put(updates, moves), AdaLoraState(count, kept, mean, spread, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _beginning(params: Any, inner: Any) -> AdaLoraState:
    """Returns the state before the first step: all ranks, and averages of zero."""
    adapters = adapters_of(params, "adalora")
    zeros = adapters.only(jax.tree.map(jnp.zeros_like, params))
    total = jnp.asarray(sum(one.E.size for one in adapters.take(params)), jnp.int32)
    # Copied, because a training step may donate its state.
    return AdaLoraState(
        jnp.zeros([], jnp.int32), total, zeros, jax.tree.map(jnp.copy, zeros), inner
    )


def _measured(
    mean: Triplet,
    spread: Triplet,
    own: Triplet,
    G: Triplet,
    counts: Array,
    b_importance: float,
    b_uncertainty: float,
) -> tuple[Triplet, Triplet]:
    """Returns the averages after a step; the old ones if it does not count."""
    rows = []
    for m, u, p, g in zip(mean, spread, own, G, strict=True):
        new = smoothed(m, u, jnp.abs(p * g), b_importance, b_uncertainty)
        rows.append(
            [jnp.where(counts, a, b).astype(b.dtype) for a, b in zip(new, (m, u), strict=True)]
        )
    means, spreads = zip(*rows, strict=True)
    return Triplet(*means), Triplet(*spreads)


def scores(means: list[Triplet], spreads: list[Triplet]) -> list[Array]:
    """Returns the importance of each triplet, (..., r) for each adapter.

    Args:
        means: average sensitivities.
        spreads: average deviations.

    Example:
        >>> mean = Triplet(jnp.array([[1.0], [2.0]]), jnp.array([[3.0, 5.0]]), jnp.array([2.0]))
        >>> scores([mean], [jax.tree.map(jnp.ones_like, mean)])[0].tolist()  # 2 + 1.5 + 4
        [7.5]
    """
    found = []
    for mean, spread in zip(means, spreads, strict=True):
        B, A, E = (m * u for m, u in zip(mean, spread, strict=True))
        found.append(E + jnp.mean(A, axis=-1) + jnp.mean(B, axis=-2))
    return found


def live_ranks(scores: list[Array], budget: Array) -> list[Array]:
    """Returns which triplets are kept: those of the highest scores of all adapters.

    Args:
        scores: importance of each triplet, for each adapter.
        budget: the number of triplets that are kept.

    Example:
        >>> [x.tolist() for x in live_ranks([jnp.array([1.0, 4.0]), jnp.array([[3.0], [2.0]])], 2)]
        [[False, True], [[True], [False]]]
    """
    return on_all(lambda all_scores: places_by_size(all_scores) < budget, scores)
