"""Steps on a sphere: matrices and products keep the Frobenius norm that they were initialised with.

With normalised steps and layers that are invariant to scale, weights grow, and the learning rate
shrinks relative to them. Weight decay counteracts this; here it can't happen. Each step is taken as
usual and then scaled back: ``W <- (W + u) |W| / |W + u|``, for a pair with W = B A by the same
factor on both sides. Exact steps are scaled in the same way.

Source: the optimizers of the marin project ("MuonH"), 2026.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from loro_jax.linalg.precision import at_least_float32, matmul
from loro_jax.pairs import Both, Pairs, pairs_of

Array = jax.Array


def with_constant_norms(
    tx: optax.GradientTransformationExtraArgs,
    matrices: Callable[[Any], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Keeps the Frobenius norms of all products ``B A``, and of chosen matrices.

    Args:
        tx: an optimizer, learning rate included. (It can't be one of a chain: this must come after
            the learning rate, and LORO must be the last of a chain.)
        matrices: a function of the parameters that returns a tree of booleans like them, true for
            the matrices (..., m, n) whose norms are kept; leading axes are layers. None: no others
            than products.

    Returns:
        The optimizer, with the state of ``tx``. A matrix of zeros moves as if alone.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from loro_jax import LowRank, loro, orthogonal
        >>> params = {"w": LowRank(jnp.ones((6, 2)), jnp.eye(2, 4))}
        >>> tx = with_constant_norms(loro(0.1, direction=orthogonal(), exact_every=None))
        >>> updates, state = tx.update(params, tx.init(params), params)
        >>> moved = optax.apply_updates(params, updates)
        >>> round(float(jnp.linalg.norm(moved["w"].product() / jnp.sqrt(12.0))), 5)
        1.0
    """

    def update(grads: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params, **extra_args)
        flags = jax.tree.map(lambda _: False, params) if matrices is None else matrices(params)
        updates = jax.tree.map(
            lambda p, u, flag: _back((p,), (u,), _norm)[0] if flag else u, params, updates, flags
        )
        pairs: Pairs = pairs_of(params, "optional")
        factors, _ = pairs.split(params)
        moved, others = pairs.split(updates)
        moved = pairs.map(lambda pair, u: _back(pair, u, _norm_of_product), factors, moved)
        return pairs.join(updates, moved, others), state

    return optax.GradientTransformationExtraArgs(tx.init, update)


def _back(parts: Any, updates: Any, norm: Callable[..., Array]) -> Both:
    """Returns updates after which the product of the parts has its old norm."""
    wide = [p.astype(at_least_float32(p.dtype)) for p in parts]
    moved = [p + u.astype(p.dtype) for p, u in zip(wide, updates, strict=True)]
    old, new = norm(*wide), norm(*moved)
    known = (old > 0) & (new > 0)
    factor = jnp.where(known, old / jnp.where(known, new, 1), 1) ** (1 / len(wide))
    return tuple(
        (factor * x - p).astype(u.dtype) for x, p, u in zip(moved, wide, updates, strict=True)
    )


def _norm(W: Array) -> Array:
    return jnp.sqrt(jnp.sum(jnp.square(W), axis=(-2, -1), keepdims=True))


def _norm_of_product(B: Array, A: Array) -> Array:
    """Returns ``|B A|`` by the factors' Gram matrices, r x r."""
    square = jnp.sum(matmul(B.mT, B) * matmul(A, A.mT), axis=(-2, -1), keepdims=True)
    return jnp.sqrt(jnp.maximum(square, 0))
