"""Subspaces spanned by columns of one cosine basis, chosen by norm: no factorisation, no projector.

Matrices have their longer side first here, (..., l, k) with l >= k. The basis Q is orthonormal, k x
k, its columns are the vectors of the discrete cosine transform (DCT-II): ``Q_ji = sqrt(2 / k)
cos(pi i (2 j + 1) / (2 k))``, and column 0 is constant. With ``S = X Q``, the r columns of S that
have the largest L1 norms are the projected matrix, and their indices, r whole numbers for each
layer, are all that defines the subspace. Q is the same for all matrices of a size and is computed
from its formula where it is needed, so no state holds it. The ``dct`` basis of
:mod:`loro_jax.peers.bases` is this one, with the smaller side first.

Choices are gathers with static shapes, for all layers of a stack at once.

Source: Modoranu et al., arXiv 2505.17967. The authors' code computes S by a fast Fourier transform,
which pays for large k, or by a product. Only the former has this basis; the latter's is the
transpose of Q, which is orthonormal, too. Here S is a product.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from loro_jax.linalg.cosine import cosine_transform
from loro_jax.linalg.precision import matmul

Array = jax.Array


def cosine_basis(k: int, dtype: Any) -> Array:
    """Returns Q for matrices (..., l, k) of a dtype, float32 or wider.

    Example:
        >>> import jax.numpy as jnp
        >>> Q = cosine_basis(3, jnp.float32)
        >>> bool(jnp.allclose(Q.T @ Q, jnp.eye(3), atol=1e-6))
        True
    """
    return cosine_transform(k, k, dtype).mT


def longer_side_first(G: Array) -> Array:
    """Swaps the last two axes of G (..., m, n) if m < n; :func:`as_before` is the inverse.

    Example:
        >>> import jax.numpy as jnp
        >>> longer_side_first(jnp.ones((2, 3, 5))).shape
        (2, 5, 3)
    """
    return G.mT if G.shape[-2] < G.shape[-1] else G


def as_before(X: Array, shape: tuple[int, ...]) -> Array:
    """Inverts :func:`longer_side_first` for a leaf of the given shape.

    Example:
        >>> import jax.numpy as jnp
        >>> as_before(jnp.ones((2, 5, 3)), (2, 3, 5)).shape
        (2, 3, 5)
    """
    return X.mT if shape[-2] < shape[-1] else X


def largest(scores: Array, rank: int) -> Array:
    """Returns the indices of the largest scores (..., k), int32 (..., r), sorted."""
    indices = jax.lax.top_k(scores, rank)[1]
    # Sorted, so that coordinates are not exchanged whenever the order of the scores changes.
    return jnp.sort(indices.astype(jnp.int32), axis=-1)


def largest_columns(S: Array, rank: int) -> Array:
    """Returns the indices of the columns with the largest L1 norms.

    Args:
        S: (..., l, k).
        rank: r <= k.

    Returns:
        int32 (..., r), sorted; of equal norms the first are taken.

    Example:
        >>> import jax.numpy as jnp
        >>> largest_columns(jnp.array([[1.0, -5.0, 0.0], [1.0, 0.0, 3.0]]), 2).tolist()
        [1, 2]
    """
    return largest(jnp.sum(jnp.abs(S), axis=-2), rank)


def strongest_columns(X: Array, Q: Array, rank: int) -> tuple[Array, Array]:
    """Chooses the columns of ``S = X Q`` that have the largest L1 norms.

    Args:
        X: (..., l, k).
        Q: (k, k).
        rank: r <= k.

    Returns:
        Their indices I, int32 (..., r), sorted, and the projected matrix ``S_I``, (..., l, r).

    Example:
        >>> import jax.numpy as jnp
        >>> columns, S_I = strongest_columns(jnp.array([[1.0, -5.0, 3.0]]), jnp.eye(3), 2)
        >>> columns.tolist(), S_I.tolist()
        ([1, 2], [[-5.0, 3.0]])
    """
    S = matmul(X, Q)
    columns = largest_columns(S, rank)
    return columns, take_columns(S, columns)


def take_columns(S: Array, columns: Array) -> Array:
    """Returns columns of S (..., l, k) by their indices (..., r).

    Example:
        >>> import jax.numpy as jnp
        >>> take_columns(jnp.array([[1.0, 2.0, 3.0]]), jnp.array([2, 0])).tolist()
        [[3.0, 1.0]]
    """
    return jnp.take_along_axis(S, columns[..., None, :], axis=-1)


def vectors_of(Q: Array, columns: Array) -> Array:
    """Returns ``Q_I^T`` (..., r, k), the chosen columns of Q as rows.

    Example:
        >>> import jax.numpy as jnp
        >>> vectors_of(jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([1])).tolist()
        [[2.0, 4.0]]
    """
    return jnp.take(Q.mT, columns, axis=0)


def coordinates(X: Array, vectors: Array) -> Array:
    """Projects X (..., l, k) onto chosen vectors ``Q_I^T`` (..., r, k), to ``X Q_I``."""
    return matmul(X, vectors.mT)


def combined(a: Array, vectors: Array) -> Array:
    """Maps coordinates (..., l, r) in chosen vectors back to a matrix, ``a Q_I^T``."""
    return matmul(a, vectors)


def moved_columns(X: Array, old: Array, new: Array) -> Array:
    """Moves coordinates from some columns of the basis to others, ``X Q_old^T Q_new``.

    Both are columns of one orthonormal matrix, so this product is a partial permutation:
    coordinates of columns that stay are copied, those of new columns are zero.

    Args:
        X: (..., l, r), coordinates in the old columns.
        old: int (..., r).
        new: int (..., r).

    Returns:
        (..., l, r), coordinates in the new columns.

    Example:
        >>> import jax.numpy as jnp
        >>> X = jnp.array([[1.0, 2.0, 3.0]])
        >>> moved_columns(X, jnp.array([4, 0, 7]), jnp.array([7, 5, 4])).tolist()
        [[3.0, 0.0, 1.0]]
    """
    same = old[..., :, None] == new[..., None, :]
    # argmax finds the place of a new column among the old ones; where there is none it is unused.
    found = take_columns(X, jnp.argmax(same, axis=-2))
    return jnp.where(jnp.any(same, axis=-2)[..., None, :], found, 0)
