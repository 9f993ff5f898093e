"""Subspaces in which methods hold the state of a gradient, by one interface for all methods.

A basis of rank r belongs to the smaller side of a gradient (..., k, l), k <= l. With P (..., k, r),
which has orthonormal columns, a gradient is projected to ``R = P^T G`` (..., r, l), a direction N
of R is lifted to ``P N``, and the complement is ``G - P P^T G``. How P is stored depends on the
kind:

==============  =============================================  ==========================
kind            columns of P                                   stored
==============  =============================================  ==========================
``svd``         leading left singular vectors of G             P, float32 or wider
``randomised``  the same, by a randomised SVD                  P, float32 or wider
``random``      random orthonormal vectors                     P, float32 or wider
``dct``         vectors of the cosine transform on which G     indices (..., r), int32
                has the largest L1 norms
``columns``     random axes: rows or columns of the weight     indices (..., r), int32
``blocks``      none: a share r / k of the stacked layers      indices of layers, (n,), int32
==============  =============================================  ==========================

``blocks`` takes whole matrices: with L layers in a leaf (L, k, l), ``n = round(L r / k)`` of them,
at least one, are in the subspace, so R and its moments are (n, k, l).

Random choices depend on the count of steps alone, so that the state needs no random key.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from loro_jax.linalg.batching import one_by_one
from loro_jax.peers.cosine_columns import (
    combined,
    coordinates,
    cosine_basis,
    largest,
    moved_columns,
    strongest_columns,
    vectors_of,
)
from loro_jax.peers.projection import leading_vectors, lift, project
from loro_jax.peers.subspace import moved_moments, randomised_factors
from loro_jax.schedules import countable

Array = jax.Array
Shape = tuple[int, ...]

# What happens to Adam's moments when the subspace changes.
MOMENTS = ("keep", "reset", "rotate")
# In which order "blocks" takes layers.
ORDERS = ("descending", "ascending", "random")


class Basis(NamedTuple):
    """A kind of basis; "shape" is a gradient's, (..., k, l) with k <= l.

    Attributes:
        begin: (shape, rank, dtype) -> zeros in the form of what is stored of a basis.
        moments: (shape, rank) -> the shape of a projected gradient.
        renew: (gradient, stored basis, count) -> a new basis.
        project: (basis, gradient) -> the projected gradient R.
        lift: (basis, direction of R's shape, shape) -> an array of that shape.
        rotate: (new basis, old basis, mu, nu, shape) -> Adam's moments in the new subspace:
            ``C mu`` and ``(C * C) nu`` with ``C = P_new^T P_old``.
    """

    begin: Callable[[Shape, int, Any], Array]
    moments: Callable[[Shape, int], Shape]
    renew: Callable[[Array, Array, Array], Array]
    project: Callable[[Array, Array], Array]
    lift: Callable[[Array, Array, Shape], Array]
    rotate: Callable[[Array, Array, Array, Array, Shape], tuple[Array, Array]]

    def complement(self, P: Array, G: Array) -> Array:
        """Returns the part of a gradient outside of the subspace, ``G - P P^T G``."""
        return G - self.lift(P, self.project(P, G), G.shape)


def basis_of(kind: str, where: str) -> Basis:
    """Returns a kind of basis.

    Args:
        kind: a key of :data:`BASES`.
        where: name of the method, for the message.

    Raises:
        ValueError: for an unknown kind.

    Example:
        >>> import jax.numpy as jnp
        >>> G = jnp.array([[0.0, 0.0, 0.0], [1.0, 2.0, 3.0]])
        >>> basis = basis_of("svd", "here")
        >>> P = basis.renew(G, basis.begin(G.shape, 1, G.dtype), jnp.int32(0))
        >>> basis.complement(P, G).round(5).tolist() == jnp.zeros_like(G).tolist()
        True
    """
    if kind not in BASES:
        raise ValueError(f"{where}: basis must be one of {', '.join(BASES)}, is {kind!r}.")
    return BASES[kind]


def renewed(
    basis: Basis,
    moments: str,
    held: tuple[Array, Array, Array],
    G: Array,
    due: Array,
    count: Array,
) -> tuple[Array, Array, Array]:
    """Renews a basis, and treats the moments accordingly, if that is due.

    Args:
        basis: its kind.
        moments: one of :data:`MOMENTS`.
        held: stored basis, mu and nu.
        G: the gradient, (..., k, l).
        due: whether the basis is to be renewed: one scalar for all layers, so that ``lax.cond``
            computes nothing on other steps.
        count: number of steps taken.

    Returns:
        The basis and the moments.
    """
    old, mu, nu = held
    if moments == "keep":
        return jax.lax.cond(due, lambda: basis.renew(G, old, count), lambda: old), mu, nu

    def change() -> tuple[Array, Array, Array]:
        new = basis.renew(G, old, count)
        if moments == "reset":
            return new, jnp.zeros_like(mu), jnp.zeros_like(nu)
        return new, *basis.rotate(new, old, mu, nu, G.shape)

    return jax.lax.cond(due, change, lambda: held)


def is_due(count: Array, update_every: int) -> Array:
    """Returns whether the subspace is renewed at a step: at steps 0, T, 2T, ..."""
    return count % countable(update_every) == 0


def step_of_adam(count: Array, update_every: int, moments: str) -> Array:
    """Returns the index, from 1, of Adam's step: moments that were reset begin again.

    Example:
        >>> import jax.numpy as jnp
        >>> [int(step_of_adam(jnp.int32(7), 3, moments)) for moments in ("keep", "reset")]
        [8, 2]
    """
    return (count % countable(update_every) if moments == "reset" else count) + 1


# Bases that are stored as P.


def _dense(renew: Callable[[Array, Array, Array], Array]) -> Basis:
    return Basis(
        begin=lambda shape, rank, dtype: jnp.zeros((*shape[:-1], rank), dtype),
        moments=_coordinates,
        renew=renew,
        project=project,
        lift=lambda P, N, shape: lift(P, N),
        rotate=lambda new, old, mu, nu, shape: moved_moments(new, old, mu, nu),
    )


def _coordinates(shape: Shape, rank: int) -> Shape:
    return (*shape[:-2], rank, shape[-1])


def _key(count: Array) -> Array:
    return jax.random.fold_in(jax.random.key(0), count)


def _random_vectors(G: Array, P: Array, count: Array) -> Array:
    def of_one(X: Array) -> Array:
        return jnp.linalg.qr(X)[0]

    return one_by_one(of_one, P.ndim - 2)(jax.random.normal(_key(count), P.shape, P.dtype))


# Bases that are stored as the indices of vectors of a fixed orthogonal matrix. Indices are sorted:
# when all are taken, coordinates are in their own order, whichever way they were chosen.


def _indexed(renew: Any, project: Any, lift: Any) -> Basis:
    return Basis(
        begin=lambda shape, rank, dtype: jnp.zeros((*shape[:-2], rank), jnp.int32),
        moments=_coordinates,
        renew=renew,
        project=project,
        lift=lift,
        rotate=_rotate_indexed,
    )


def _rows(X: Array, indices: Array) -> Array:
    """Gathers rows of X (..., s, l); rows of zeros for indices of s."""
    return jnp.take_along_axis(X, indices[..., None], axis=-2, mode="fill", fill_value=0)


def _positions(indices: Array, size: int) -> Array:
    """Returns, for each of ``size`` indices, its position among the given ones, or their number."""
    *batch, rank = indices.shape
    none = jnp.full((*batch, size), rank, jnp.int32)
    numbers = jnp.broadcast_to(jnp.arange(rank, dtype=jnp.int32), indices.shape)
    return jnp.put_along_axis(none, indices, numbers, axis=-1, inplace=False)


def _rotate_indexed(
    new: Array, old: Array, mu: Array, nu: Array, shape: Shape
) -> tuple[Array, Array]:
    # C = P_new^T P_old acts on rows here, the transposed R = P_old^T P_new there.
    return moved_columns(mu.mT, old, new).mT, moved_columns(nu.mT, old, new).mT


def _random_axes(G: Array, indices: Array, count: Array) -> Array:
    # The largest of independent uniform numbers are a uniform choice without replacement.
    scores = jax.random.uniform(_key(count), G.shape[:-1])
    return largest(scores, indices.shape[-1])


def _scattered(indices: Array, N: Array, shape: Shape) -> Array:
    # A gather by the inverse indices, with zeros where there is none, in place of a scatter.
    return _rows(N, _positions(indices, shape[-2]))


# Cosines: the functions of `cosine_columns`, whose matrices have their longer side first.


def _strongest_cosines(G: Array, indices: Array, count: Array) -> Array:
    Q = cosine_basis(G.shape[-2], G.dtype)
    return strongest_columns(G.mT, Q, indices.shape[-1])[0]


def _chosen_cosines(indices: Array, size: int, dtype: Any) -> Array:
    # Cheaper than a transform of the gradient, as r < k: only the vectors that are needed.
    return vectors_of(cosine_basis(size, dtype), indices)


def _project_to_cosines(indices: Array, G: Array) -> Array:
    return coordinates(G.mT, _chosen_cosines(indices, G.shape[-2], G.dtype)).mT


def _lift_cosines(indices: Array, N: Array, shape: Shape) -> Array:
    return combined(N.mT, _chosen_cosines(indices, shape[-2], N.dtype)).mT


# Whole matrices of a stacked leaf.


def blocks(order: str) -> Basis:
    """Returns the basis that consists of whole matrices of a stacked leaf.

    Args:
        order: one of :data:`ORDERS`. "descending" begins with the last layers and continues with
            the ones before them, "ascending" with the first, round and round; "random" draws them.

    Example:
        >>> import jax.numpy as jnp
        >>> basis, G = blocks("descending"), jnp.ones((4, 2, 2))
        >>> first = basis.renew(G, basis.begin(G.shape, 1, G.dtype), jnp.int32(0))
        >>> first.tolist(), basis.renew(G, first, jnp.int32(200)).tolist()
        ([2, 3], [0, 1])
    """
    return Basis(
        begin=lambda shape, rank, dtype: jnp.zeros(_taken(shape, rank), jnp.int32),
        moments=lambda shape, rank: (_taken(shape, rank), *shape[-2:]),
        renew=functools.partial(_next_blocks, order),
        project=lambda taken, G: _flat(G)[taken],
        lift=_lift_blocks,
        rotate=_rotate_blocks,
    )


def _taken(shape: Shape, rank: int) -> int:
    if len(shape) < 3:
        raise ValueError(
            f'basis "blocks" chooses among stacked layers, but a projected leaf has sides '
            f"{' and '.join(map(str, shape))} only; expected a leading axis of layers, or another "
            "basis."
        )
    return max(1, round(math.prod(shape[:-2]) * rank / shape[-2]))


def _flat(G: Array) -> Array:
    return G.reshape(-1, *G.shape[-2:])


def _next_blocks(order: str, G: Array, taken: Array, count: Array) -> Array:
    number, layers = len(taken), math.prod(G.shape[:-2])
    if order == "random":
        return largest(jax.random.uniform(_key(count), (layers,)), number)
    # The next turn begins after the last one. Turns are sets: where one wraps around, its
    # sorted indices do not show where it ended, so that is derived from its first member.
    held = jnp.zeros(layers, bool).at[taken].set(True)
    steps = jnp.arange(number, dtype=jnp.int32)
    if order == "descending":
        # The end is the member whose predecessor is not held; all: the turn repeats.
        end = jnp.argmax(held & ~jnp.roll(held, 1))
        start = jnp.where(count == 0, layers, end)
        following = start - 1 - steps
    else:
        end = jnp.argmax(held & ~jnp.roll(held, -1))
        start = jnp.where(count == 0, -1, end)
        following = start + 1 + steps
    return jnp.sort((following % layers).astype(jnp.int32))


def _lift_blocks(taken: Array, N: Array, shape: Shape) -> Array:
    zeros = jnp.zeros((math.prod(shape[:-2]), *shape[-2:]), N.dtype)
    return zeros.at[taken].set(N, unique_indices=True).reshape(shape)


def _rotate_blocks(
    new: Array, old: Array, mu: Array, nu: Array, shape: Shape
) -> tuple[Array, Array]:
    kept = _positions(old, math.prod(shape[:-2]))[new]
    moved = [jnp.take(x, kept, axis=0, mode="fill", fill_value=0) for x in (mu, nu)]
    return moved[0], moved[1]


BASES: dict[str, Basis] = {
    "svd": _dense(lambda G, P, count: leading_vectors(G, P.shape[-1])),
    "randomised": _dense(lambda G, P, count: randomised_factors(G, count, P.shape[-1])[0]),
    "random": _dense(_random_vectors),
    "dct": _indexed(_strongest_cosines, _project_to_cosines, _lift_cosines),
    "columns": _indexed(_random_axes, lambda P, G: _rows(G, P), _scattered),
    "blocks": blocks("descending"),
}
