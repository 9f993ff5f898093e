"""Low-rank projection of a gradient, and Adam in the subspace.

All matrices have their smaller side first, (..., k, l) with k <= l; leading axes are batch axes
(the layers of a scanned model). A projector P is (..., k, r) with orthonormal columns; a projected
gradient ``R = P^T G`` is (..., r, l), and so are its moments.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from loro_jax.linalg.batching import one_by_one
from loro_jax.linalg.precision import matmul

Array = jax.Array


class AdamConstants(NamedTuple):
    """Adam's decays and epsilon, as in ``optax.scale_by_adam``."""

    b1: float
    b2: float
    eps: float


def smaller_side_first(G: Array) -> Array:
    """Swaps the last two axes of G (..., m, n) if m > n; :func:`as_shaped` is the inverse.

    Example:
        >>> import jax.numpy as jnp
        >>> smaller_side_first(jnp.ones((2, 5, 3))).shape
        (2, 3, 5)
    """
    return G.mT if G.shape[-2] > G.shape[-1] else G


def as_shaped(D: Array, shape: tuple[int, ...]) -> Array:
    """Inverts :func:`smaller_side_first` for a leaf of the given shape.

    Example:
        >>> import jax.numpy as jnp
        >>> as_shaped(jnp.ones((2, 3, 5)), (2, 5, 3)).shape
        (2, 5, 3)
    """
    return D.mT if shape[-2] > shape[-1] else D


def project(P: Array, G: Array) -> Array:
    """Projects a gradient to its coordinates in the subspace, ``R = P^T G``."""
    return matmul(P.mT, G)


def lift(P: Array, N: Array) -> Array:
    """Maps coordinates in the subspace back to a matrix, ``P N``."""
    return matmul(P, N)


def leading_vectors(G: Array, rank: int) -> Array:
    """Computes the first ``rank`` left singular vectors of G.

    Args:
        G: (..., k, l) with k <= l.
        rank: r <= k.

    Returns:
        (..., k, r), orthonormal columns.

    Example:
        >>> import jax.numpy as jnp
        >>> P = leading_vectors(jnp.array([[0.0, 3.0, 0.0], [1.0, 0.0, 0.0]]), 1)
        >>> [abs(round(float(x), 3)) for x in P[:, 0]]
        [1.0, 0.0]
    """

    def of_one(G: Array) -> Array:
        return jnp.linalg.svd(G, full_matrices=False)[0][:, :rank]

    return one_by_one(of_one, G.ndim - 2)(G)


def adam(
    G: Array, mu: Array, nu: Array, step: Array, constants: AdamConstants
) -> tuple[Array, Array, Array]:
    """Takes one step of Adam on one array.

    Args:
        G: gradient.
        mu: first moment.
        nu: second moment.
        step: index of this step, from 1.
        constants: decays and epsilon.

    Returns:
        The bias-corrected direction, and the new moments.

    Example:
        >>> import jax.numpy as jnp
        >>> zero = jnp.zeros(2)
        >>> G, step = jnp.array([3.0, -0.5]), jnp.int32(1)
        >>> direction, _, _ = adam(G, zero, zero, step, AdamConstants(0.9, 0.999, 1e-8))
        >>> [round(float(x), 3) for x in direction]
        [1.0, -1.0]
    """
    b1, b2, eps = constants
    # Epsilon is added to the corrected root, as in Optax, and unlike in LORO's Adam.
    mu = optax.tree.update_moment(G, mu, b1, 1)
    nu = optax.tree.update_moment_per_elem_norm(G, nu, b2, 2)
    mean = optax.tree.bias_correction(mu, b1, step)
    square = optax.tree.bias_correction(nu, b2, step)
    return mean / (jnp.sqrt(square) + eps), mu, nu
