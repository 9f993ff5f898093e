"""Low-rank training that balances its factors every K steps.

After an ordinary step of the factors, ``B A`` is factorised by its SVD, ``B = U S^(1/2)`` and
``A = S^(1/2) V^T``, and Adam's moments are reset: this changes the factors but not the product. It
is LORO without its Riemannian step.

* :func:`lowrank_restarts`: plain low-rank AdamW with "weight refactorization" and "momentum reset"
  (Glentis et al., "Scalable Parameter and Memory Efficient Pretraining for LLM", 2025, arXiv
  2505.22922).
* :func:`svd_projection`: LORO's approximate steps, scaled by r / min(m, n), with only the
  retraction instead of its exact step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import optax

from loro_jax.descent import riemannian_descent
from loro_jax.directions.protocol import Direction, as_direction
from loro_jax.lowrank import balance, rank_ratio
from loro_jax.peers.wide import in_float32


def balanced_step(lr_scale: float | None) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """Makes a step of the factors followed by a balanced factorisation of their product.

    Args:
        lr_scale: factor on the learning rate; None: r / min(m, n) of each pair.

    Returns:
        An ``exact_step`` for :func:`loro_jax.riemannian_descent`.

    Example:
        >>> import jax.numpy as jnp
        >>> B, A = jnp.ones((1, 4, 2)), jnp.ones((1, 2, 3))
        >>> B, A = balanced_step(1.0)(B, A, B, A, 0.5, 0)
        >>> round(float((B @ A)[0, 0, 0]), 4)  # 2 (1 - 0.5)^2
        0.5
    """

    def step(
        B: jax.Array, A: jax.Array, dB: jax.Array, dA: jax.Array, learning_rate: Any, count: Any
    ) -> tuple[jax.Array, jax.Array]:
        del count
        # The same step as on all other steps; only the factorisation afterwards is special.
        scale = rank_ratio(B, A) if lr_scale is None else lr_scale
        size = learning_rate * scale
        # Weight refactorization: B = U S^(1/2) and A = S^(1/2) V^T, from the SVD of the product.
        return balance((B - size * dB).astype(B.dtype), (A - size * dA).astype(A.dtype))

    return step


def lowrank_restarts(
    learning_rate: optax.ScalarOrSchedule,
    *,
    every: int = 200,
    direction: optax.GradientTransformation | Direction | None = None,
    lr_scale: float | None = 1.0,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """Optimizes by low-rank AdamW; balances the factors and resets the moments every K steps.

    Args:
        learning_rate: a number or a schedule.
        every: K.
        direction: ``optax.scale_by_adam()`` by default, with moments in float32 or wider.
        lr_scale: factor on the learning rate of the factors; None: r / min(m, n).
        **options: passed to :func:`loro_jax.riemannian_descent`, for example ``moments``.

    Returns:
        An ``optax.GradientTransformationExtraArgs``, which must be the last in a chain.

    Raises:
        ValueError: as :func:`loro_jax.riemannian_descent`.

    Example:
        >>> import jax.numpy as jnp
        >>> from loro_jax import LowRank
        >>> params = {"w": LowRank(jnp.ones((6, 2)), jnp.eye(2, 4))}
        >>> tx = lowrank_restarts(0.01, every=50)
        >>> updates, state = tx.update(params, tx.init(params), params)
    """
    directed = as_direction(in_float32(optax.scale_by_adam()) if direction is None else direction)
    # To balanced_step None means r / min(m, n), which is for gradients, not for moves.
    if directed.kind == "moves" and lr_scale is None:
        lr_scale = directed.lr_scale
    return riemannian_descent(
        learning_rate,
        directed,
        balanced_step(lr_scale),
        every,
        lr_scale=lr_scale,
        **options,
    )


def svd_projection(
    learning_rate: optax.ScalarOrSchedule, *, every: int = 500, **options: Any
) -> optax.GradientTransformationExtraArgs:
    """Optimizes by LORO with only the retraction instead of its exact step.

    Args:
        learning_rate: a number or a schedule.
        every: K.
        **options: as for :func:`lowrank_restarts`.

    Returns:
        An ``optax.GradientTransformationExtraArgs``, which must be the last in a chain.

    Example:
        >>> import jax.numpy as jnp
        >>> from loro_jax import LowRank
        >>> params = {"w": LowRank(jnp.ones((6, 2)), jnp.eye(2, 4))}
        >>> tx = svd_projection(0.01, every=50)
        >>> updates, state = tx.update(params, tx.init(params), params)
    """
    return lowrank_restarts(learning_rate, every=every, **{"lr_scale": None, **options})
