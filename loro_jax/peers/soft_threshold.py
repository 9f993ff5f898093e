"""Soft thresholds after an optimizer's step: SoRA's gates, and CoDyRA's for tasks in sequence.

Adapters are ``dW = s B diag(g) A`` with a gate for each rank. After each step of the optimizer the
gates shrink towards zero by a threshold: the proximal step of an l1 penalty. Ranks whose gates are
zero are dead: they add nothing to the output, and no gradient reaches their B and A.

The authors' code of both methods also sets to zero what is left below the threshold after the
subtraction. So gates below twice the threshold become zero, and a gate at zero comes back only if
one step moves it by at least that much: otherwise it stays dead.

Sources: Ding et al., "Sparse Low-rank Adaptation of Pre-trained Language Models", EMNLP 2023 (arXiv
2311.11696); Lu et al., "Adaptive Rank, Reduced Forgetting: Knowledge Retention in Continual
Learning Vision-Language Models with Dynamic Rank-Selective LoRA", 2024 (arXiv 2412.01004); and the
authors' code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from loro_jax.peers.triplets import names_of
from loro_jax.schedules import value_at

Array = jax.Array
# A tree of bools like the parameters, or a function that returns one.
Where = Any | Callable[[Any], Any]


class SoftThresholdState(NamedTuple):
    """State of :func:`soft_threshold`.

    Attributes:
        count: steps taken, int32 scalar.
    """

    count: Array  # type: ignore[assignment]  # shadows tuple.count, as in Optax


def shrunk(x: Array, threshold: jax.typing.ArrayLike, dead_zone: bool = True) -> Array:
    """Returns ``sign(x) max(|x| - k, 0)``, the soft threshold.

    Args:
        x: any array.
        threshold: k.
        dead_zone: whether what is then below k becomes zero, too.

    Example:
        >>> x = jnp.array([3.0, -3.0, 1.5, 0.5, 0.0])
        >>> shrunk(x, 1.0, dead_zone=False).tolist()
        [2.0, -2.0, 0.5, 0.0, 0.0]
        >>> shrunk(x, 1.0).tolist()
        [2.0, -2.0, 0.0, 0.0, 0.0]
    """
    rest = jnp.maximum(jnp.abs(x) - threshold, 0)
    if dead_zone:
        rest = jnp.where(rest < threshold, 0, rest)
    return (jnp.sign(x) * rest).astype(x.dtype)


def soft_threshold(
    threshold: optax.ScalarOrSchedule, *, dead_zone: bool = True
) -> optax.GradientTransformation:
    """Shrinks parameters after the step of the optimizers before it in a chain.

    Args:
        threshold: k, a number or a schedule.
        dead_zone: see :func:`shrunk`.

    Returns:
        An ``optax.GradientTransformation`` for the end of a chain, learning rate included: its
        updates lead from the parameters to :func:`shrunk` of what they would have become.

    Raises:
        ValueError: from ``update``, without ``params``.

    Example:
        >>> tx = optax.chain(optax.sgd(1.0), soft_threshold(0.5))
        >>> x = jnp.array([3.0, 1.5])
        >>> updates, _ = tx.update(jnp.array([1.0, 1.0]), tx.init(x), x)
        >>> (x + updates).tolist()
        [1.5, 0.0]
    """

    def init(params: Any) -> SoftThresholdState:
        return SoftThresholdState(jnp.zeros([], jnp.int32))

    def update(
        updates: Any, state: SoftThresholdState, params: Any = None
    ) -> tuple[Any, SoftThresholdState]:
        if params is None:
            raise ValueError("soft_threshold: update needs params, which it shrinks.")
        k = value_at(threshold, state.count)

        def move(u: Array, p: Array) -> Array:
            return (shrunk(p + u, k, dead_zone) - p).astype(u.dtype)

        # Where nothing is to shrink, the update stays as it is, to the bit.
        moved = jax.tree.map(lambda u, p: jnp.where(k > 0, move(u, p), u), updates, params)
        return moved, SoftThresholdState(optax.safe_increment(state.count))

    return optax.GradientTransformation(init, update)


def is_gate(params: Any) -> Any:
    """Returns which parameters are gates, those named ``gate`` beside B and A.

    Example:
        >>> is_gate({"up": {"B": 1, "A": 2, "gate": 3}, "gate": {"W": 4}})
        {'gate': {'W': False}, 'up': {'A': False, 'B': False, 'gate': True}}
    """
    paths = [tuple(names_of(p)) for p, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
    known = set(paths)
    flags = [
        path[-1] == "gate" and (*path[:-1], "B") in known and (*path[:-1], "A") in known
        for path in paths
    ]
    return jax.tree.unflatten(jax.tree.structure(params), flags)


def sora(
    optimizer: optax.GradientTransformation,
    *,
    penalty: float = 10.0,
    threshold: float = 3e-4,
    gates: Where = is_gate,
) -> optax.GradientTransformationExtraArgs:
    """Makes gates sparse that another optimizer trains: an l1 penalty, and a soft threshold.

    Args:
        optimizer: trains all parameters, its learning rate included. AdamW in the paper, without
            weight decay of the gates.
        penalty: weight of the mean of ``|g|`` over all gates, whose gradient is added to the
            loss's: to one that may have been clipped before.
        threshold: k, independent of the learning rate.
        gates: which parameters are gates.

    Returns:
        An ``optax.GradientTransformationExtraArgs``.

    Example:
        >>> params = {"B": jnp.ones((3, 2)), "A": jnp.ones((2, 3)), "gate": jnp.array([1.0, 4e-4])}
        >>> tx = sora(optax.sgd(0.0))
        >>> updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
        >>> [round(float(g), 5) for g in params["gate"] + updates["gate"]]
        [0.9997, 0.0]
    """

    def add(grads: Any, params: Any) -> Any:
        flags = _flags(gates, params)
        count = sum(p.size for p, flag in _both(params, flags) if flag)
        return jax.tree.map(
            lambda g, p, flag: g + (penalty / count * jnp.sign(p)).astype(g.dtype) if flag else g,
            grads,
            params,
            flags,
        )

    shrinking = optax.masked(soft_threshold(threshold), gates)
    return optax.chain(optax.stateless(add), optax.with_extra_args_support(optimizer), shrinking)


def codyra(
    optimizer: optax.GradientTransformation,
    total_steps: int,
    *,
    threshold: float = 0.005,
    dense: float = 0.5,
    stages: int = 50,
    gates: Where = is_gate,
) -> optax.GradientTransformationExtraArgs:
    """Shrinks gates that another optimizer trains by a threshold that grows after a dense phase.

    After each task the adapters are merged into the weights, and new ones start.

    Args:
        optimizer: trains all parameters, its learning rate included; AdamW in the paper.
        total_steps: T, length of a task.
        threshold: the last threshold, see :func:`growing_threshold`.
        dense: share of the steps without a threshold.
        stages: number of stages in which it grows.
        gates: which parameters are gates.

    Returns:
        An ``optax.GradientTransformationExtraArgs``.

    Example:
        >>> tx = codyra(optax.sgd(0.0), 10, threshold=0.4, stages=5)
        >>> params = {"B": jnp.ones((3, 1)), "A": jnp.ones((1, 3)), "gate": jnp.ones(1)}
        >>> state, found = tx.init(params), []
        >>> for _ in range(9):
        ...     updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
        ...     params = optax.apply_updates(params, updates)
        ...     found.append(round(float(params["gate"][0]), 3))
        >>> found
        [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.8, 0.5, 0.0]
    """
    schedule = growing_threshold(total_steps, threshold, dense, stages)
    return optax.chain(
        optax.with_extra_args_support(optimizer), optax.masked(soft_threshold(schedule), gates)
    )


def growing_threshold(
    total_steps: int, threshold: float = 0.005, dense: float = 0.5, stages: int = 50
) -> optax.Schedule:
    """Returns CoDyRA's threshold: none in the dense phase, then in stairs up to its last value.

    The values are ``stages`` numbers from 0 to ``threshold``; the next one is taken at each step,
    from the end of the dense phase on, that is a multiple of the length of a stage. The threshold
    is first applied one step after the end of that phase.

    Args:
        total_steps: T.
        threshold: the last value.
        dense: share of the steps without a threshold.
        stages: number of values.

    Example:
        >>> schedule = growing_threshold(10, 0.4, 0.5, 5)
        >>> [round(float(schedule(step)), 3) for step in range(4, 10)]
        [0.0, 0.0, 0.2, 0.3, 0.4, 0.4]
    """
    first = dense * total_steps
    # Of at least one step, also in runs that are shorter than the stages.
    length = max(int((total_steps - first) // stages), 1)
    begun = -(-first // length)

    def schedule(step: jax.typing.ArrayLike) -> Array:
        stage = jnp.asarray(step) // length - begun + 1
        value = threshold * jnp.minimum(stage, stages - 1) / max(stages - 1, 1)
        return jnp.where(jnp.asarray(step) > first, value, 0.0)

    return schedule


def _flags(gates: Where, params: Any) -> Any:
    return gates(params) if callable(gates) else gates


def _both(params: Any, flags: Any) -> list[tuple[Array, bool]]:
    return list(zip(jax.tree.leaves(params), jax.tree.leaves(flags), strict=True))
