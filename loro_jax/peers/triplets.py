"""Adapters of the form ``dW = s B diag(E) A`` in parameter trees, for methods that choose ranks.

A triplet is a column of B, an entry of E and a row of A: what one rank of dW consists of.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from loro_jax.linalg.precision import matmul

Array = jax.Array


class Triplet(NamedTuple):
    """The three arrays of an adapter, or values that belong to them.

    Attributes:
        B: (..., m, r); leading axes are layers.
        A: (..., r, n).
        E: (..., r).
    """

    B: Any
    A: Any
    E: Any


@dataclasses.dataclass(frozen=True)
class Adapters:
    """The adapters of a parameter tree: takes their arrays out of trees like it, and puts them in.

    Attributes:
        places: positions of the adapters' arrays among the tree's leaves.
        scores: position of each adapter's leaf ``score``, or None.
    """

    places: tuple[Triplet, ...]
    scores: tuple[int | None, ...]

    def take(self, tree: Any) -> list[Triplet]:
        """Returns the adapters' leaves of a tree."""
        leaves, _ = _flat(tree)
        return [Triplet(*(leaves[i] for i in place)) for place in self.places]

    def put(self, tree: Any, values: Sequence[Triplet]) -> Any:
        """Returns the tree with other leaves of the adapters; those that are None stay."""
        leaves, structure = _flat(tree)
        for place, value in zip(self.places, values, strict=True):
            for i, leaf in zip(place, value, strict=True):
                leaves[i] = leaves[i] if leaf is None else leaf
        return jax.tree.unflatten(structure, leaves)

    def only(self, tree: Any) -> Any:
        """Returns the tree with ``optax.MaskedNode`` in place of what is no adapter's."""
        leaves, structure = _flat(tree)
        mine = {i for place in self.places for i in place}
        kept = [leaf if i in mine else optax.MaskedNode() for i, leaf in enumerate(leaves)]
        return jax.tree.unflatten(structure, kept)


def adapters_of(params: Any, method: str) -> Adapters:
    """Finds the adapters of a parameter tree: sibling leaves named B, A and E.

    Args:
        params: the parameters, also with Flax's variables in them.
        method: the method's name, for messages.

    Raises:
        ValueError: if there are none.

    Example:
        >>> params = {"up": {"B": jnp.ones((4, 2)), "A": jnp.ones((2, 3)), "E": jnp.ones(2)}}
        >>> adapters_of(params, "adalora").places
        (Triplet(B=1, A=0, E=2),)
    """
    by_parent: dict[tuple[str, ...], dict[str, int]] = {}
    for i, (path, _) in enumerate(jax.tree_util.tree_flatten_with_path(params)[0]):
        *parent, name = names_of(path)
        by_parent.setdefault(tuple(parent), {})[name] = i
    found = [names for names in by_parent.values() if {"B", "A", "E"} <= names.keys()]
    if not found and jax.tree.leaves(params):
        raise ValueError(
            f"{method}: expected sibling parameters named B, A and E, as those of an adapter of "
            f"the kind {method!r}, but there are none."
        )
    places = tuple(Triplet(*(names[name] for name in Triplet._fields)) for names in found)
    return Adapters(places, tuple(names.get("score") for names in found))


def names_of(path: Sequence[Any]) -> list[str]:
    """Returns the names on a leaf's path, without the entry by which Flax's variables hold it."""
    names = [str(getattr(e, "key", getattr(e, "name", getattr(e, "idx", e)))) for e in path]
    return names[:-1] if len(names) > 1 and names[-1] == "value" else names


def orthogonality_gradient(one: Triplet, open_: Array | None = None) -> tuple[Array, Array]:
    """Returns the gradient of ``|A A^T - I|_F + |B^T B - I|_F``, summed over layers.

    Args:
        one: B, A and E of an adapter.
        open_: which triplets count, bool (..., r); None: all.

    Returns:
        The gradients of B and A; zero for a norm of zero.
    """

    def of_rows(X: Array) -> Array:
        D = matmul(X, X.mT) - jnp.eye(X.shape[-2], dtype=X.dtype)
        if open_ is not None:
            D = jnp.where(open_[..., :, None] & open_[..., None, :], D, 0)
        norm = jnp.linalg.norm(D, axis=(-2, -1), keepdims=True)
        # The norm's derivative is D / |D|, and D is symmetric.
        return 2 * matmul(D / jnp.maximum(norm, jnp.finfo(X.dtype).tiny), X)

    return of_rows(one.B.mT).mT, of_rows(one.A)


def penalised(
    grads: Sequence[Triplet],
    params: Sequence[Triplet],
    weight: float,
    open_: Sequence[Array | None] | None = None,
) -> list[Triplet]:
    """Adds the gradient of the orthogonality penalty to those of the adapters.

    The penalty is the weight times the mean of :func:`orthogonality_gradient`'s norms over all
    matrices, two for each layer's adapter.

    Args:
        grads: gradients of the loss.
        params: the adapters.
        weight: factor on the penalty.
        open_: for each adapter which triplets count; None: all.
    """
    factor = weight / (2 * modules(params))
    new = []
    for G, one, mask in zip(grads, params, open_ or [None] * len(params), strict=True):
        of_B, of_A = orthogonality_gradient(one, mask)
        new.append(G._replace(B=G.B + factor * of_B, A=G.A + factor * of_A))
    return new


def modules(params: Sequence[Triplet]) -> int:
    """Returns the number of matrices with an adapter, those of stacks of layers one by one."""
    return sum(math.prod(one.E.shape[:-1]) for one in params)


def smoothed(
    mean: Any, spread: Any, now: Any, b_importance: float, b_uncertainty: float
) -> tuple[Any, Any]:
    """Averages importances, and their deviations from the average, exponentially.

    Args:
        mean: average so far.
        spread: average deviation so far.
        now: present importance.
        b_importance: decay of the average.
        b_uncertainty: decay of the deviation.
    """
    mean = b_importance * mean + (1 - b_importance) * now
    return mean, b_uncertainty * spread + (1 - b_uncertainty) * jnp.abs(now - mean)


def on_all(function: Callable[[Array], Array], values: Sequence[Array]) -> list[Array]:
    """Applies a function of one vector to the entries of several arrays, and splits its result.

    Example:
        >>> on_all(lambda x: x - x.max(), [jnp.zeros((2, 1)), jnp.ones(2)])[0].tolist()
        [[-1.0], [-1.0]]
    """
    whole = function(jnp.concatenate([value.ravel() for value in values]))
    ends = [0]
    for value in values:
        ends.append(ends[-1] + value.size)
    return [whole[a:b].reshape(v.shape) for v, a, b in zip(values, ends, ends[1:], strict=False)]


def places_by_size(values: Array) -> Array:
    """Returns the place of each entry of a vector when ordered from the largest, ties as they are.

    Example:
        >>> places_by_size(jnp.array([1.0, 3.0, 3.0])).tolist()
        [2, 0, 1]
    """
    return jnp.argsort(jnp.argsort(-values, stable=True), stable=True)


def _flat(tree: Any) -> tuple[list[Any], Any]:
    # Holes count, so that positions are those of the whole tree.
    return jax.tree.flatten(tree, is_leaf=lambda node: isinstance(node, optax.MaskedNode))
