"""Scaled gradient descent: gradients of the factors preconditioned by the other factor's Gram.

For a pair W = B A with the gradients ``g_B = G A^T`` and ``g_A = B^T G``,

    ``d_B = g_B (A A^T + delta I)^-1``    and    ``d_A = (B^T B + delta I)^-1 g_A``.

Without damping, the product's move ``d_B A + B d_A = G P_V + P_U G`` depends neither on the choice
of factors for W nor on their conditioning. Steps along d are ScaledGD (Tong, Ma and Chi); Adam
applied to d instead of the gradient is scaled AdamW (Zhang and Pilanci).

LORO's exact step expects gradients and divides them by the Gram matrices. So a direction d is first
multiplied by the Gram matrices: with ``d_B (A A^T)`` and ``(B^T B) d_A`` the exact step moves W
along ``(I - P_U) d_B A + B d_A``, the tangent vector of the directions at their original scale. For
Adam's directions this is the exact step of scaled AdamW; for d without damping and Adam it is a
step along the Riemannian gradient.

Sources: Tong, Ma and Chi, "Accelerating Ill-Conditioned Low-Rank Matrix Estimation via Scaled
Gradient Descent", JMLR 2021; Zhang and Pilanci, "Riemannian Preconditioned LoRA for Fine-Tuning
Foundation Models", ICML 2024 (scaled GD and scaled AdamW).
"""

from __future__ import annotations

from typing import Any

import jax
import optax

from loro_jax.checks import check_not_negative
from loro_jax.descent import riemannian_descent
from loro_jax.directions.adam import adam
from loro_jax.directions.protocol import Direction, as_direction
from loro_jax.exact.tangent import multiply_by_grams
from loro_jax.exact.update import PairBatch, exact_step, of_other_directions
from loro_jax.pairs import Both, Pairs, PairsSpec, find_pairs
from loro_jax.peers.grams import divide_by_grams

Array = jax.Array


def scale_by_preconditioner(
    damping: jax.typing.ArrayLike = 1e-6, pairs: PairsSpec | None = None
) -> optax.GradientTransformation:
    """Multiplies the gradients of each pair's factors by the damped inverse of a Gram matrix.

    Args:
        damping: delta >= 0, added to the diagonals of ``A A^T`` and ``B^T B``. In float32,
            eigenvalues of a Gram matrix below r * 1e-7 of its diagonal can't be distinguished from
            zero; they are raised to about this value, so that results are finite for factors of any
            rank, including zero.
        pairs: None to detect the pairs automatically, or a spec: see :func:`loro_jax.find_pairs`.

    Returns:
        A stateless ``optax.GradientTransformation`` that needs ``params``. Leaves that are not
        factors pass through, and so does a tree without pairs. Computed in float32 or wider, and
        returned in the gradients' dtypes.

    Raises:
        ValueError: for a negative ``damping``; from ``update``, without ``params``, or if a pair's
            shapes do not fit.

    Example:
        Scaled AdamW as a chain:

        >>> import jax, jax.numpy as jnp, optax
        >>> from loro_jax import LowRank
        >>> tx = optax.chain(scale_by_preconditioner(), optax.adamw(1e-3))
        >>> params = LowRank(jnp.eye(6, 2), 10 * jnp.eye(2, 4))
        >>> grads = LowRank(jnp.ones((6, 2)), jnp.ones((2, 4)))
        >>> updates, state = tx.update(grads, tx.init(params), params)

        The gradient of B is divided by the squares of A's singular values:

        >>> scaled, _ = scale_by_preconditioner(0.0).update(grads, optax.EmptyState(), params)
        >>> round(float(scaled.B[0, 0]), 5), round(float(scaled.A[0, 0]), 5)
        (0.01, 1.0)

    Source: Zhang and Pilanci, ICML 2024 (scaled GD).
    """
    check_not_negative("scale_by_preconditioner", damping=damping)

    def init(params: Any) -> optax.EmptyState:
        del params
        return optax.EmptyState()

    def update(
        grads: Any, state: optax.EmptyState, params: Any = None
    ) -> tuple[Any, optax.EmptyState]:
        if params is None:
            raise ValueError("scale_by_preconditioner: update needs params, in its third place.")
        scaled, structure = jax.tree.flatten(grads)
        factors = jax.tree.leaves(params)
        # Pairs' entries in the list of leaves are replaced; all others stay the plain gradients.
        for pair in find_pairs(params, pairs):
            B, A, g_B, g_A = factors[pair.B], factors[pair.A], scaled[pair.B], scaled[pair.A]
            # Scaled GD: d_B = g_B (A A^T + delta I)^-1 and d_A = (B^T B + delta I)^-1 g_A.
            d_B, d_A = divide_by_grams(B, A, g_B, g_A, damping)
            scaled[pair.B], scaled[pair.A] = d_B.astype(g_B.dtype), d_A.astype(g_A.dtype)
        return jax.tree.unflatten(structure, scaled), state

    return optax.GradientTransformation(init, update)


def preconditioned_direction(
    damping: jax.typing.ArrayLike = 1e-6,
    then: optax.GradientTransformation | Direction | None = None,
) -> Direction:
    """Makes a direction of preconditioned gradients.

    Args:
        damping: as for :func:`scale_by_preconditioner`.
        then: turns them into directions; None: Adam.

    Returns:
        A direction; for leaves that are not factors it uses the plain gradients.
    """
    inner = adam() if then is None else as_direction(then)

    def divide(factors: Both, gradients: Both) -> Both:
        scaled = divide_by_grams(*factors, *gradients, damping)
        return scaled[0].astype(gradients[0].dtype), scaled[1].astype(gradients[1].dtype)

    def update(
        grads: Any, state: Any, params: Any, pairs: Pairs, **extra_args: Any
    ) -> tuple[Any, Any]:
        # Leaves outside of pairs come from the last tree: their gradients are unchanged.
        scaled = pairs.map(divide, params, grads)
        # Scaled AdamW: Adam's moments are averages of the scaled gradients.
        return inner.update(scaled, state, params, pairs, **extra_args)

    return Direction(inner.init, update, lr_scale=1.0)


def preconditioned(
    learning_rate: optax.ScalarOrSchedule,
    *,
    damping: jax.typing.ArrayLike = 1e-6,
    exact_every: int | None = None,
    direction: optax.GradientTransformation | Direction | None = None,
    max_move: jax.typing.ArrayLike | None = None,
    exact_method: str = "auto",
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """Optimizes by scaled AdamW, optionally with LORO's exact steps.

    Args:
        learning_rate: a number or a schedule.
        damping: delta, see :func:`scale_by_preconditioner`.
        exact_every: K; step t, counted from 0, is exact when ``(t + 1) % K == 0``. None: never.
        direction: turns preconditioned gradients into directions; None: Adam. With
            ``optax.identity()`` the method is ScaledGD.
        max_move: trust region of the exact step.
        exact_method: how the exact step is computed.
        **options: passed to :func:`loro_jax.riemannian_descent`: ``lr_scale`` (1 by default, for
            matrices that are not square, too), ``moments`` (except "transport", which is for
            moments of plain gradients), ``weight_decay``, ``regular``, ``pairs`` and ``mesh``.

    Returns:
        An ``optax.GradientTransformationExtraArgs`` with a :class:`loro_jax.LoroState`.

    Raises:
        ValueError: for a negative ``damping`` or ``max_move``, ``moments="transport"``, an unknown
            ``exact_method``, and as :func:`loro_jax.loro`.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from loro_jax import LowRank
        >>> params = {"w": LowRank(jnp.eye(6, 2), 10 * jnp.eye(2, 4)), "b": jnp.zeros(6)}
        >>> def loss(params):
        ...     return jnp.sum((params["w"].product() + params["b"][:, None] - 3.0) ** 2)
        >>> tx = preconditioned(0.01, exact_every=2)
        >>> state, start = tx.init(params), loss(params)
        >>> for _ in range(4):
        ...     updates, state = tx.update(jax.grad(loss)(params), state, params)
        ...     params = optax.apply_updates(params, updates)
        >>> bool(loss(params) < start)
        True

    Sources: Tong, Ma and Chi, JMLR 2021; Zhang and Pilanci, ICML 2024; the exact step of Mo, Huang
    and Pan, ICLR 2025, Proposition 4.
    """
    check_not_negative("preconditioned", damping=damping)
    if options.get("moments") == "transport":
        raise ValueError(
            'preconditioned: moments must be "reset", "reset_factors", "keep" or None, but is '
            '"transport", which carries moments of plain gradients.'
        )
    of_gradients = exact_step(method=exact_method, max_move=max_move, where="preconditioned")

    # The exact step divides its gradients by the Gram matrices. These directions are divided
    # already, so they are multiplied first.
    def gradients(batch: PairBatch) -> PairBatch:
        return PairBatch(batch.B, batch.A, *multiply_by_grams(*batch[:4]), batch.rate)

    step = of_other_directions(of_gradients, gradients)
    return riemannian_descent(
        learning_rate, preconditioned_direction(damping, direction), step, exact_every, **options
    )
