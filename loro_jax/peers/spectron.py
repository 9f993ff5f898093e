"""Spectron: orthogonalised momentum of both factors, with a bound on how far their product moves.

For a pair W = B A, with sigma(X) the largest singular value of X and eta the learning rate:

* momentum: ``M <- beta M + (1 - beta) G`` for the gradient G of each factor;
* orthogonalisation: ``O = NewtonSchulz(M)``, nearly the nearest matrix with orthonormal columns
  (or rows), so that ``sigma(O)`` is about 1;
* renormalisation: ``rho = eta / (sigma(B) + sigma(A) + 1)``, and both factors step by ``-rho O``.

The product then moves by ``-rho (O_B A + B O_A) + rho^2 O_B O_A``, of spectral norm at most
``rho (sigma(A) + sigma(B) + rho) <= eta`` while ``rho <= 1``. The Newton-Schulz polynomial may
overshoot, ``sigma(O) <= 1.203``, so the guaranteed bound is ``1.203 eta``. The two norms are lower
estimates, by a power iteration that starts from the vectors of the last step: the bound is loose in
the first steps, until these are close to the singular vectors.

Source: Janson, Oyallon and Belilovsky, "Stabilizing Native Low-Rank LLM Pretraining",
arXiv 2602.12429, 2026; constants that its summaries do not give are those of NVIDIA's
Emerging-Optimizers, except for the momentum, 0.95 (there 0.9).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import optax

from loro_jax.checks import check_not_negative, check_orthogonalised_momentum
from loro_jax.descent import riemannian_descent
from loro_jax.directions.protocol import Direction
from loro_jax.leaves import WeightDecay, split_weight_decay
from loro_jax.linalg.newton_schulz import orthogonalise, power_iteration, start_vector
from loro_jax.linalg.precision import at_least_float32
from loro_jax.pairs import Both, Pairs

Array = jax.Array


class SpectronState(NamedTuple):
    """State of :func:`spectron_direction`.

    Attributes:
        momentum: averaged gradients, a tree like the factors.
        vectors: vectors of the power iterations: (..., m, 1) for each B, (..., 1, n) for each A.
    """

    momentum: Any
    vectors: Any


def spectron_direction(momentum: float = 0.95, newton_schulz_steps: int = 5) -> Direction:
    """Returns Spectron's moves of the factors as a direction.

    Args:
        momentum: beta, the decay of the averaged gradients.
        newton_schulz_steps: Newton-Schulz iterations on the momentum.

    Returns:
        A direction of kind "moves"; its ``lr_scale`` is 1.

    Raises:
        ValueError: for a ``momentum`` outside [0, 1), or no iterations.
    """
    check_orthogonalised_momentum("spectron", momentum, newton_schulz_steps)

    def average(old: Array, grad: Array) -> Array:
        return momentum * _widened(old) + (1 - momentum) * _widened(grad)

    def init(params: Any) -> SpectronState:
        return SpectronState(optax.tree.zeros_like(params), jax.tree.map(_start, params))

    def update(
        grads: Any, state: SpectronState, params: Any, pairs: Pairs, **extra_args: Any
    ) -> tuple[Any, SpectronState]:
        del extra_args
        # Algorithm 1: M <- beta M + (1 - beta) G.
        averaged = jax.tree.map(average, state.momentum, grads)
        # O = NewtonSchulz(M), of a spectral norm of about 1.
        orthogonal = jax.tree.map(lambda M: orthogonalise(M, newton_schulz_steps), averaged)
        # sigma(B) and sigma(A): one power iteration each, from the vectors of the last step.
        estimates = jax.tree.map(_largest_singular_value, params, state.vectors)
        # A tree of pairs (sigma, vector) becomes two trees.
        sigmas, vectors = (
            jax.tree.map(lambda _, both, i=i: both[i], params, estimates) for i in (0, 1)
        )
        # Both factors step by rho O, with the rho of their pair.
        moves = pairs.map(_renormalised, sigmas, orthogonal)
        kept = jax.tree.map(lambda M, old: M.astype(old.dtype), averaged, state.momentum)
        return moves, SpectronState(kept, vectors)

    return Direction(init, update, kind="moves", lr_scale=1.0)


def spectron(
    learning_rate: optax.ScalarOrSchedule,
    *,
    momentum: float = 0.95,
    newton_schulz_steps: int = 5,
    weight_decay: WeightDecay = 0.0,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """Optimizes the factors of all pairs by Spectron, and all other leaves by Adam.

    Args:
        learning_rate: a number or a schedule. eta is ``lr_scale`` times this: it bounds the
            spectral norm of the product's update, so its scale differs from Adam's.
        momentum: beta, the decay of the averaged gradients.
        newton_schulz_steps: Newton-Schulz iterations on the momentum.
        weight_decay: decoupled decay; each step shrinks a leaf by its learning rate (for a factor
            eta, not rho) times this. Or a pair ``(number, mask)``.
        **options: passed to :func:`loro_jax.riemannian_descent`: ``lr_scale`` (1 by default),
            ``regular`` (by default LORO's Adam, :func:`loro_jax.adam`) and ``pairs``.

    Returns:
        An ``optax.GradientTransformationExtraArgs`` with a :class:`loro_jax.LoroState`; it needs
        ``params``, and its updates have the parameters' dtypes. Steps of factors narrower than
        float32 are computed in float32.

    Raises:
        ValueError: for a ``momentum`` outside [0, 1), no iterations, a negative ``weight_decay``;
            and as :func:`loro_jax.loro`.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from loro_jax import LowRank
        >>> params = {"w": LowRank(jnp.ones((6, 2)), jnp.eye(2, 4)), "b": jnp.zeros(6)}
        >>> def loss(params):
        ...     return jnp.sum((params["w"].product() + params["b"][:, None] - 3.0) ** 2)
        >>> tx = spectron(0.01, lr_scale=30.0)
        >>> updates, state = tx.update(jax.grad(loss)(params), tx.init(params), params)
        >>> moved = optax.apply_updates(params, updates)
        >>> bool(loss(moved) < loss(params))
        True
        >>> change = moved["w"].product() - params["w"].product()
        >>> bool(jnp.linalg.norm(change, 2) < 1.203 * 0.3)
        True

    Source: the paper named above, Algorithm 1.
    """
    check_not_negative("spectron", weight_decay=split_weight_decay(weight_decay)[0])
    direction = spectron_direction(momentum, newton_schulz_steps)
    return riemannian_descent(
        learning_rate, direction, None, None, weight_decay=weight_decay, **options
    )


def _start(X: Array) -> Array:
    """Returns a unit vector to start the power iteration on the longer side of a factor."""
    return start_vector(X) if X.shape[-2] >= X.shape[-1] else start_vector(X.mT).mT


def _largest_singular_value(X: Array, vector: Array) -> tuple[Array, Array]:
    """Runs one more iteration; returns the estimate, (..., 1, 1), and the vector."""
    if X.shape[-2] >= X.shape[-1]:
        return power_iteration(_widened(X), vector)
    sigma, left = power_iteration(_widened(X).mT, vector.mT)
    return sigma, left.mT


def _renormalised(sigmas: Both, orthogonal: Both) -> Both:
    # rho / eta: `riemannian_descent` multiplies by the learning rate and the sign.
    rho = 1 / (sigmas[0] + sigmas[1] + 1)
    return rho * orthogonal[0], rho * orthogonal[1]


def _widened(x: Array) -> Array:
    return x.astype(at_least_float32(x.dtype))
