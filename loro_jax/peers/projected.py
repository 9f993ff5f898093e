"""The Optax transformation shared by methods that project gradients of dense leaves.

A method defines the initial state and the step of one projected matrix; this module splits the
tree, runs plain Adam on the other leaves, and applies learning rate and weight decay.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from loro_jax.linalg.precision import at_least_float32
from loro_jax.peers.bases import (
    BASES,
    MOMENTS,
    Basis,
    basis_of,
    is_due,
    renewed,
    step_of_adam,
)
from loro_jax.peers.projection import AdamConstants, adam, as_shaped, smaller_side_first
from loro_jax.schedules import value_at

Array = jax.Array
Projected = Any | Callable[[Any], Any]
# The state of one leaf: projector, mu, nu, and further arrays of the method.
Slots = tuple[Array, ...]


class ProjectedSettings(NamedTuple):
    """The settings that all methods of projected gradients share.

    Attributes:
        learning_rate: a number or a schedule.
        rank: r of every projector, or the largest r.
        projected: which leaves to project: a tree of bools with the parameters' structure, or a
            callable that returns it, given the parameters. A projected leaf is (..., m, n); leading
            axes are layers, each with its own projector.
        update_every: T. Steps 0, T, 2T, ... compute new projectors.
        scale: alpha, a factor on the updates within the subspace.
        constants: Adam's decays and epsilon, as in ``optax.scale_by_adam``.
        weight_decay: decoupled decay of all leaves, ``lr * weight_decay`` per step.
        basis: the kind of basis, a key of :data:`loro_jax.peers.bases.BASES`.
        moments: the treatment of Adam's moments when the subspace changes, one of
            :data:`loro_jax.peers.bases.MOMENTS`.
    """

    learning_rate: optax.ScalarOrSchedule
    rank: int
    projected: Projected
    update_every: int
    scale: float
    constants: AdamConstants
    weight_decay: float
    basis: str = "svd"
    moments: str = "keep"

    def checked(self, where: str) -> ProjectedSettings:
        """Returns the settings; raises ValueError for values that no method can use."""
        for name, value in (("rank", self.rank), ("update_every", self.update_every)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(
                    f"{where}: {name} must be a whole number of at least 1, is {value!r}."
                )
        for name, decay in (("b1", self.constants.b1), ("b2", self.constants.b2)):
            if not 0 <= decay < 1:
                raise ValueError(f"{where}: {name} must be at least 0 and below 1, is {decay!r}.")
        for name, amount in (("eps", self.constants.eps), ("weight_decay", self.weight_decay)):
            if amount < 0:
                raise ValueError(f"{where}: {name} must not be negative, is {amount!r}.")
        basis_of(self.basis, where)
        if self.moments not in MOMENTS:
            raise ValueError(
                f"{where}: moments must be one of {', '.join(MOMENTS)}, is {self.moments!r}."
            )
        return self

    def begin(self, shape: tuple[int, ...], dtype: Any) -> Slots:
        """Returns zeros for the projector and the moments of a matrix (..., k, l), k <= l."""
        return empty_slots(BASES[self.basis], shape, self.rank, dtype)

    def in_subspace(
        self, G: Array, held: Slots, count: Array
    ) -> tuple[Array, Array, tuple[Array, Array, Array]]:
        """Renews the projector if that is due, projects a gradient, and takes a step of Adam.

        Args:
            G: gradient, (..., k, l) with k <= l.
            held: projector and moments.
            count: number of steps taken.

        Returns:
            The projected gradient R, Adam's direction N of R, and projector and moments.
        """
        basis, T = BASES[self.basis], self.update_every
        # At t = 0, T, 2T, ... the projector from this step's gradient.
        P, mu, nu = held
        P, mu, nu = renewed(basis, self.moments, (P, mu, nu), G, is_due(count, T), count)
        R = basis.project(P, G)
        N, mu, nu = adam(R, mu, nu, step_of_adam(count, T, self.moments), self.constants)
        return R, N, (P, mu, nu)


def empty_slots(basis: Basis, shape: tuple[int, ...], rank: int, dtype: Any) -> Slots:
    """Returns zeros for a basis and Adam's moments of a matrix (..., k, l), k <= l."""
    moments = basis.moments(shape, rank)
    return basis.begin(shape, rank, dtype), jnp.zeros(moments, dtype), jnp.zeros(moments, dtype)


def projected_descent(
    where: str,
    settings: ProjectedSettings,
    state_type: Callable[..., Any],
    begin: Callable[[tuple[int, ...], Any], Slots],
    step: Callable[[Array, Slots, Array], tuple[Array, Slots]],
) -> optax.GradientTransformationExtraArgs:
    """Makes the transformation of a method.

    Args:
        where: name of the method, for messages.
        settings: the settings that all methods share.
        state_type: NamedTuple of ``count``, ``projector``, ``mu``, ``nu`` and the method's own
            fields. All except the count are trees with the parameters' structure; a leaf that is
            not projected has a scalar zero in each tree except ``mu`` and ``nu``.
        begin: (shape (..., k, l) with k <= l, dtype) of a matrix -> its initial slots.
        step: (gradient (..., k, l), slots, count from 0) -> (direction, new slots).

    Returns:
        An ``optax.GradientTransformationExtraArgs``.

    Raises:
        ValueError: from ``init``, if ``projected`` does not fit the parameters or the rank exceeds
            the smaller side of a leaf; from ``update``, without ``params`` if there is weight
            decay.
    """
    learning_rate, weight_decay = settings.learning_rate, settings.weight_decay
    constants = settings.constants

    def init(params: Any) -> Any:
        count = jnp.zeros([], jnp.int32)
        treedef: Any
        leaves, treedef = jax.tree.flatten(params)
        if not leaves:  # includes Optax's placeholder for a tree of parameters
            fields = len(jax.eval_shape(lambda: begin((1, 1, 1), jnp.float32)))
            return state_type(count, *[params] * fields)
        flags = flags_of(params, settings.projected, settings.rank, where)
        slots = [_begin(leaf, flag, begin) for leaf, flag in zip(leaves, flags, strict=True)]
        return state_type(count, *[treedef.unflatten(field) for field in zip(*slots, strict=True)])

    def update(grads: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        del extra_args
        if params is None and weight_decay:
            raise ValueError(f"{where}: update needs params, because weight_decay is not zero.")
        treedef: Any
        leaves, treedef = jax.tree.flatten(grads)
        count, *trees = state
        columns = [treedef.flatten_up_to(tree) for tree in trees]
        rate = value_at(learning_rate, count)
        # Without parameters (and so without decay) only the dtype of W is used: the gradient's.
        old = leaves if params is None else treedef.flatten_up_to(params)
        updates, slots = [], []
        for G, W, *held in zip(leaves, old, *columns, strict=True):
            D, new = _direction(G, tuple(held), count, step, constants)
            if weight_decay:
                # As in AdamW: outside of Adam, scaled by the learning rate, and not by alpha.
                D = D + weight_decay * W.astype(D.dtype)
            updates.append((-rate * D).astype(W.dtype))
            slots.append(new)
        # Without leaves zip yields nothing, and the empty trees stay.
        trees = [treedef.unflatten(field) for field in zip(*slots, strict=True)] or trees
        return treedef.unflatten(updates), type(state)(optax.safe_increment(count), *trees)

    return optax.GradientTransformationExtraArgs(init, update)


def flags_of(params: Any, projected: Projected, rank: int, where: str) -> list[bool]:
    """Returns which leaves are projected, in the order of the leaves.

    Args:
        params: the parameters.
        projected: a tree of bools, or a callable that returns it.
        rank: the least length of the sides of a projected leaf.
        where: name of the method, for messages.

    Raises:
        ValueError: if the tree does not match the parameters, or a projected leaf is no matrix or
            smaller than the rank.
    """
    tree = projected(params) if callable(projected) else projected
    treedef: Any
    named, treedef = jax.tree_util.tree_flatten_with_path(params)
    if jax.tree.structure(tree) != treedef:
        raise ValueError(
            f"{where}: projected must be a tree of bools of the parameters' structure {treedef}, "
            f"but has the structure {jax.tree.structure(tree)}."
        )
    flags = jax.tree.leaves(tree)
    for flag, (path, leaf) in zip(flags, named, strict=True):
        name = jax.tree_util.keystr(path)
        # The choice is made in Python, so a traced array can't be a flag.
        if not isinstance(flag, bool):
            raise ValueError(f"{where}: projected must hold bools, but has {flag!r} at {name}.")
        if flag and (leaf.ndim < 2 or rank > min(leaf.shape[-2:])):
            raise ValueError(
                f"{where}: the projected leaf {name} has shape {tuple(leaf.shape)}; expected "
                f"(..., m, n) with min(m, n) at least the rank {rank}."
            )
    return flags


def _begin(leaf: Array, flag: bool, begin: Callable[[tuple[int, ...], Any], Slots]) -> Slots:
    dtype = at_least_float32(leaf.dtype)
    if flag:
        *batch, m, n = leaf.shape
        return begin((*batch, min(m, n), max(m, n)), dtype)
    # Scalars replace the arrays that plain Adam does not need: every tree has an array at every
    # leaf, and none is empty, so containers and checkpoints need no special case.
    projector, _, _, *others = jax.eval_shape(lambda: begin((1, 1, 1), dtype))
    mu, nu = jnp.zeros(leaf.shape, dtype), jnp.zeros(leaf.shape, dtype)
    return (
        jnp.zeros([], projector.dtype),
        mu,
        nu,
        *(jnp.zeros([], other.dtype) for other in others),
    )


def _direction(
    G: Array,
    held: Slots,
    count: Array,
    step: Callable[[Array, Slots, Array], tuple[Array, Slots]],
    constants: AdamConstants,
) -> tuple[Array, Slots]:
    projector, mu, nu, *others = held
    wide = G.astype(mu.dtype)
    # `_begin` gave leaves that are not projected a scalar in the place of a projector.
    if projector.ndim > 0:
        D, new = step(smaller_side_first(wide), held, count)
        return as_shaped(D, G.shape), new
    D, mu, nu = adam(wide, mu, nu, count + 1, constants)
    return D, (projector, mu, nu, *others)
