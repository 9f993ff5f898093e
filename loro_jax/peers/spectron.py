"""Spectron: orthogonalised momentum of both factors, with a bound on how far their product moves.

For a pair W = B A, with sigma(X) the largest singular value of X and eta the learning rate:

* momentum: ``M <- beta M + (1 - beta) G`` for the gradient G of each factor;
* orthogonalisation: ``O = NewtonSchulz(M)``, nearly the nearest matrix with orthonormal columns
  (or rows), so that ``sigma(O)`` is about 1;
* renormalisation: ``rho = eta / (sigma(B) + sigma(A) + 1)``, and both factors step by ``-rho O``.

The product then moves by ``-rho (O_B A + B O_A) + rho^2 O_B O_A``, of spectral norm at most
``rho (sigma(A) + sigma(B) + rho) <= eta`` while ``rho <= 1``. The Newton-Schulz polynomial may
overshoot, ``sigma(O) <= 1.203``, so what holds for sure is ``1.203 eta``. And the two norms are
estimates from below, by a power iteration that goes on from where it stopped a step ago: the bound
is loose in the first steps, until its vectors have turned towards the singular ones.

Source: Janson, Oyallon and Belilovsky, "Stabilizing Native Low-Rank LLM Pretraining",
arXiv 2602.12429, 2026; constants that its summaries do not give are those of NVIDIA's
Emerging-Optimizers, but for the momentum, 0.95 (there 0.9).
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from loro_jax.checks import check_orthogonalised_momentum
from loro_jax.descent import join_factors, places_of_factors, split_factors
from loro_jax.directions.adam import scale_by_uncorrected_adam
from loro_jax.linalg.newton_schulz import orthogonalise, power_iteration, start_vector
from loro_jax.linalg.precision import at_least_float32
from loro_jax.pairs import Pair, PairsSpec, describe_leaves, find_pairs

Array = jax.Array


class SpectronState(NamedTuple):
    """State of :func:`spectron`.

    Attributes:
        count: steps taken, int32 scalar.
        momentum: averaged gradients of the factors, with ``optax.MaskedNode`` at other leaves.
        vectors: where the power iterations stand: (..., m, 1) for each B, (..., 1, n) for each A.
        regular: state for the other leaves, with ``optax.MaskedNode`` at the factors.
    """

    count: Array  # type: ignore[assignment]  # shadows tuple.count, as in Optax
    momentum: Any
    vectors: Any
    regular: Any


def spectron(
    learning_rate: optax.ScalarOrSchedule,
    *,
    momentum: float = 0.95,
    newton_schulz_steps: int = 5,
    weight_decay: jax.typing.ArrayLike = 0.0,
    pairs: PairsSpec | None = None,
    require_pairs: bool = True,
    regular: optax.GradientTransformation | None = None,
    regular_learning_rate: optax.ScalarOrSchedule | None = None,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-6,
) -> optax.GradientTransformationExtraArgs:
    """Spectron for the factors of all pairs, Adam for all other leaves.

    Args:
        learning_rate: a number or a schedule. For the factors it is eta, the bound on the spectral
            norm of the product's update, and so of another size than Adam's.
        momentum: beta, the decay of the averaged gradients.
        newton_schulz_steps: Newton-Schulz iterations on the momentum.
        weight_decay: decoupled decay; each step shrinks a leaf by its learning rate (for a factor
            eta, not rho) times this.
        pairs: None to find the pairs by themselves, or a spec: see :func:`loro_jax.find_pairs`.
        require_pairs: raise when the tree holds no pair. False: such a tree gets plain Adam.
        regular: transformation for all other leaves, learning rate and decay included; None: the
            Adam that LORO uses, :func:`loro_jax.scale_by_uncorrected_adam`.
        regular_learning_rate: learning rate of that Adam; None: the same as for the factors.
        b1: decay of its first moment.
        b2: decay of its second moment.
        eps: added to the root of its uncorrected second moment.

    Returns:
        An ``optax.GradientTransformationExtraArgs`` that needs ``params``, and whose updates have
        the parameters' dtypes. Factors narrower than float32 are stepped in float32.

    Raises:
        ValueError: for a ``momentum`` outside [0, 1), fewer than one iteration, a negative
            ``weight_decay``, or both ``regular`` and ``regular_learning_rate``; from
            ``init`` and ``update``, when no pair is found or a pair's shapes do not fit; from
            ``update``, without ``params``.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from loro_jax import LowRank
        >>> params = {"w": LowRank(jnp.ones((6, 2)), jnp.eye(2, 4)), "b": jnp.zeros(6)}
        >>> def loss(params):
        ...     return jnp.sum((params["w"].product() + params["b"][:, None] - 3.0) ** 2)
        >>> tx = spectron(0.3, regular_learning_rate=0.01)
        >>> updates, state = tx.update(jax.grad(loss)(params), tx.init(params), params)
        >>> moved = optax.apply_updates(params, updates)
        >>> bool(loss(moved) < loss(params))
        True
        >>> change = moved["w"].product() - params["w"].product()
        >>> bool(jnp.linalg.norm(change, 2) < 1.203 * 0.3)
        True

    Source: the paper named above, Algorithm 1.
    """
    _check(momentum, newton_schulz_steps, weight_decay)
    if regular is not None and regular_learning_rate is not None:
        raise ValueError(
            "spectron: pass regular= or regular_learning_rate=, not both: a transformation of "
            "your own has its own learning rate."
        )
    others_tx = optax.with_extra_args_support(regular or scale_by_uncorrected_adam(b1, b2, eps))
    regular_rate = learning_rate if regular_learning_rate is None else regular_learning_rate

    def find(params: Any) -> list[Pair]:
        found = find_pairs(params, pairs)
        # An empty tree stands for "no parameters here" in optax.tree.map_params and partitions.
        if require_pairs and not found and jax.tree.leaves(params):
            raise ValueError(
                f"spectron: no low-rank pair found; the tree holds {describe_leaves(params)}. Name "
                "the pairs with pairs=..., or pass require_pairs=False for plain Adam."
            )
        return found

    def init(params: Any) -> SpectronState:
        found = find(params)
        factors, others = split_factors(params, found)
        leaves, structure = jax.tree.flatten(factors)
        vectors = [*leaves]
        for b, a in places_of_factors(found):
            vectors[b], vectors[a] = start_vector(leaves[b]), start_vector(leaves[a].mT).mT
        return SpectronState(
            count=jnp.zeros([], jnp.int32),
            momentum=optax.tree.zeros_like(factors),
            vectors=jax.tree.unflatten(structure, vectors),
            regular=others_tx.init(others),
        )

    def update(
        grads: Any, state: SpectronState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, SpectronState]:
        if params is None:
            raise ValueError("spectron: update needs params: tx.update(grads, state, params).")
        found = find(params)
        factor_grads, other_grads = split_factors(grads, found)
        factors, others = split_factors(params, found)

        averaged = jax.tree.map(partial(_average, momentum), state.momentum, factor_grads)
        directions = jax.tree.map(lambda M: orthogonalise(M, newton_schulz_steps), averaged)
        leaves, vectors, moves = (jax.tree.leaves(t) for t in (factors, state.vectors, directions))
        eta = _at(learning_rate, state.count)
        for b, a in places_of_factors(found):
            B, A = leaves[b], leaves[a]
            sigma_B, vectors[b] = power_iteration(_widened(B), vectors[b])
            sigma_A, left_A = power_iteration(_widened(A).mT, vectors[a].mT)
            vectors[a] = left_A.mT
            rho = eta / (sigma_B + sigma_A + 1)
            moves[b] = (-rho * moves[b] - eta * weight_decay * B).astype(B.dtype)
            moves[a] = (-rho * moves[a] - eta * weight_decay * A).astype(A.dtype)

        other_updates, regular_state = others_tx.update(
            other_grads, state.regular, others, **extra_args
        )
        if regular is None:
            rate = _at(regular_rate, state.count)
            other_updates = jax.tree.map(
                lambda d, p: (-rate * (d + weight_decay * p)).astype(p.dtype),
                other_updates,
                others,
            )
        new_state = SpectronState(
            count=optax.safe_increment(state.count),
            momentum=jax.tree.map(lambda M, old: M.astype(old.dtype), averaged, state.momentum),
            vectors=jax.tree.unflatten(jax.tree.structure(state.vectors), vectors),
            regular=regular_state,
        )
        return join_factors(grads, found, moves, other_updates), new_state

    return optax.GradientTransformationExtraArgs(init, update)


def _average(decay: Any, average: Array, new: Array) -> Array:
    return decay * _widened(average) + (1 - decay) * _widened(new)


def _widened(x: Array) -> Array:
    return x.astype(at_least_float32(x.dtype))


def _at(rate: optax.ScalarOrSchedule, count: Array) -> Any:
    return rate(count) if callable(rate) else rate


def _check(momentum: Any, newton_schulz_steps: int, weight_decay: Any) -> None:
    # What is not a plain number may be traced (a hyperparameter in a state), and can't be read.
    check_orthogonalised_momentum("spectron", momentum, newton_schulz_steps)
    if isinstance(weight_decay, float | int) and weight_decay < 0:
        raise ValueError(f"spectron: weight_decay must not be negative, but is {weight_decay}.")
