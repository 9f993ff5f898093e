"""Makes any Flax NNX network low-rank, and dense again."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from loro_jax.layers.common import Original, ProjectionSpec
from loro_jax.layers.dense import Dense
from loro_jax.layers.factorised import FactorisedLayer, Split, split_of
from loro_jax.layers.initial import initial_factors, key_of, relative_error
from loro_jax.layers.kernels import as_array, pair_axes
from loro_jax.layers.low_rank import LowRankLinear
from loro_jax.layers.places import Path, modules, put_everywhere
from loro_jax.layers.selection import Rank, Where, is_inclusive, joined, resolve_rank, select
from loro_jax.layers.sharding import placed_pair, whole
from loro_jax.layers.table import Row, Summary

Array = jax.Array
Model = TypeVar("Model", bound=nnx.Module)


def factorise(
    model: Model,
    rank: Rank,
    *,
    where: Where = None,
    init: str = "auto",
    key: Array | None = None,
    in_place: bool = False,
) -> Model:
    """Replaces layers of a network by layers whose kernels are pairs (B, A).

    ``nnx.Linear`` and :class:`~loro_jax.layers.dense.Dense` become
    :class:`~loro_jax.layers.low_rank.LowRankLinear`; ``nnx.LinearGeneral`` (as in
    ``nnx.MultiHeadAttention``), ``nnx.Einsum``, ``nnx.Conv`` and the einsum modules of other
    packages become :class:`~loro_jax.layers.factorised.FactorisedLayer`. They are called as before,
    keep bias, dtypes, precision and sharding annotations, and :func:`loro_jax.loro` finds their
    pairs: B (out, r), A (r, in). Stacks of layers, as made by ``nnx.vmap``, have pairs with leading
    axes.

    Args:
        model: the network, its arrays also abstract (``nnx.eval_shape``) or traced.
        rank: a whole number; a share of each matrix's smaller side, as a float; or a function of
            path and shape (outputs, inputs) that returns one of both, or None: leave it dense.
        where: which layers: None for all, a pattern or several ("blocks/**", "!head"), or a
            predicate of path and layer. See :func:`loro_jax.layers.selection.select`.
        init: initial factors: a name of :func:`loro_jax.initialise`, drawn at the size of the
            present weights, or "svd": their best approximation.
        key: JAX random key; None: ``jax.random.key(0)``.
        in_place: whether to change ``model`` itself, so that dense weights are freed one by one.

    Returns:
        The low-rank network; ``model`` itself if ``in_place``.

    Raises:
        ValueError: if a rank does not fit, ``where`` matches nothing, a layer that ``where`` asks
            for has a kernel that is no matrix, or a kernel is shared with another module.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> rngs = nnx.Rngs(0)
        >>> model = nnx.Sequential(nnx.Linear(64, 32, rngs=rngs), nnx.Linear(32, 10, rngs=rngs))
        >>> low_rank = factorise(model, rank=8, where="!layers/1")
        >>> jax.tree.map(jnp.shape, nnx.to_pure_dict(nnx.state(low_rank))["layers"][0])
        {'A': (8, 64), 'B': (32, 8), 'bias': (32,)}
        >>> low_rank(jnp.ones((5, 64))).shape
        (5, 10)
    """
    changed = model if in_place else nnx.clone(model)
    duplicates = nnx.find_duplicates(changed)
    # All is checked before anything is changed.
    plans = list(_plans(changed, rank, where, duplicates))
    for plan in plans:
        changed = put_everywhere(changed, plan.path, duplicates, _low_rank(plan, init, key))
    if in_place and changed is not model:
        raise ValueError("factorise: the network is a single layer, which can't change in place.")
    return changed


def merge(model: Model, *, in_place: bool = False) -> Model:
    """Replaces low-rank layers by the dense ones that compute the same function.

    Args:
        model: a network with pairs, made by :func:`factorise` or of the projections of this folder.
        in_place: whether to change ``model`` itself.

    Returns:
        The dense network: layers of the classes, options and metadata that they had before
        :func:`factorise`; projections of this folder become
        :class:`~loro_jax.layers.dense.Dense`.

    Raises:
        ValueError: if a projection is no matrix, because of its activation.

    Example:
        >>> from flax import nnx
        >>> model = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
        >>> type(merge(factorise(model, rank=4, init="svd"))).__name__
        'Linear'
    """
    changed = model if in_place else nnx.clone(model)
    duplicates = nnx.find_duplicates(changed)
    found = [(p, m) for p, m in modules(changed) if isinstance(m, LowRankLinear | FactorisedLayer)]
    for path, layer in found:
        changed = put_everywhere(changed, path, duplicates, _dense(joined(path), layer))
    if in_place and changed is not model:
        raise ValueError("merge: the network is a single layer, which can't change in place.")
    return changed


def summary(model: nnx.Module, dense: nnx.Module | None = None) -> Summary:
    """Returns a table of a network's layers: shape, rank, parameters and operations.

    Args:
        model: a network, dense or low-rank.
        dense: the network before :func:`factorise`, for the relative error of each product.

    Returns:
        The table, which is shown when it is printed; its totals are attributes.

    Example:
        >>> from flax import nnx
        >>> model = nnx.Linear(64, 32, rngs=nnx.Rngs(0))
        >>> print(summary(factorise(model, rank=8)))
        layer          shape    rank  parameters  now  FLOPs a token  now
        (the network)  32 x 64  8     2,080       800  12,288         4,608
        others                        0           0
        total                         2,080       800  12,288         4,608
    """
    before = dict(modules(dense)) if dense is not None else {}
    rows = [row for path, layer in modules(model) if (row := _row(path, layer, before.get(path)))]
    parameters = sum(int(np.prod(p.shape)) for p in jax.tree.leaves(nnx.state(model, nnx.Param)))
    return Summary(tuple(rows), parameters - sum(row.after for row in rows))


@dataclasses.dataclass(frozen=True)
class _Plan:
    """A layer to replace."""

    path: Path
    layer: nnx.Module
    split: Split
    rank: int

    @property
    def kernel(self) -> nnx.Param:
        return getattr(self.layer, self.split.kernel)


def _splits(model: nnx.Module) -> dict[Path, tuple[nnx.Module, Split | ValueError]]:
    """Returns the layers of known kinds, and how they split or why they don't."""
    found: dict[Path, tuple[nnx.Module, Split | ValueError]] = {}
    for path, layer in modules(model):
        try:
            split = split_of(layer)
            if split is not None:
                _check_kernel(getattr(layer, split.kernel))
                found[path] = layer, split
        except ValueError as error:
            found[path] = layer, error
    return found


def _check_kernel(kernel: nnx.Variable) -> None:
    if not jax.numpy.issubdtype(kernel.dtype, jax.numpy.floating):
        raise ValueError(f"its kernel is {kernel.dtype}, expected a real floating-point dtype")


def _plans(
    model: nnx.Module, rank: Rank, where: Where, duplicates: list[list[Path]]
) -> Iterator[_Plan]:
    found = _splits(model)
    by_name = {joined(path): path for path in found}
    layers = {name: found[path][0] for name, path in by_name.items()}
    shared = {path: group for group in duplicates for path in group}
    for name in select(layers, where, "factorise"):
        path = by_name[name]
        layer, split = found[path]
        if isinstance(split, ValueError):
            if is_inclusive(where):
                raise ValueError(
                    f"factorise: {name!r}, {type(layer).__name__}, has no kernel that is a matrix: "
                    f"{split}; leave it out: where='!{name}'."
                )
            continue
        chosen = resolve_rank(rank, name, split.layout.matrix_shape, "factorise")
        if chosen is None:
            continue
        kernel = (*path, split.kernel)
        if kernel in shared:
            others = ", ".join(repr(joined(p)) for p in shared[kernel] if p != kernel)
            raise ValueError(
                f"factorise: the kernel of {name!r} is shared with {others}; expected one that no "
                f"other module uses: leave the layer out, where='!{name}', or untie it first."
            )
        yield _Plan(path, layer, split, chosen)


def _low_rank(plan: _Plan, init: str, key: Array | None) -> nnx.Module:
    """Returns the low-rank layer that takes a dense one's place."""
    variable, layout = plan.kernel, plan.split.layout
    W = _matrix(variable, plan.split)
    B, A = initial_factors(W, plan.rank, init, key_of(key, joined(plan.path)))
    B, A = placed_pair(variable.get_value(), layout, B, A)
    names_B, names_A = pair_axes(layout, _axes(variable))
    of_B, of_A = _variable(variable, B, names_B), _variable(variable, A, names_A)
    if isinstance(plan.layer, Dense):
        return _projection(plan.layer, of_B, of_A, plan.split.layout.matrix_shape, None)
    original = Original.of(plan.layer)
    if isinstance(plan.layer, nnx.Linear) and _is_plain(plan.layer):
        return _projection(plan.layer, of_B, of_A, plan.split.layout.matrix_shape, original)
    bias = getattr(plan.layer, "bias", None)
    return FactorisedLayer(of_B, of_A, bias, plan.split, original)


def _projection(
    layer: nnx.Linear | Dense,
    B: nnx.Param,
    A: nnx.Param,
    shape: tuple[int, int],
    original: Original | None,
) -> LowRankLinear:
    """Makes a low-rank projection of the options of a layer and of its factors."""
    spec = ProjectionSpec(rank=B.shape[-1], dtype=layer.dtype, precision=layer.precision)
    m, n = shape
    made = nnx.eval_shape(lambda: LowRankLinear(n, m, spec, rngs=nnx.Rngs(0)))
    made.B, made.A, made.bias, made.original = B, A, nnx.data(layer.bias), original
    return made


def _is_plain(layer: nnx.Linear) -> bool:
    """Returns whether LowRankLinear has all options that are set."""
    plain = _plain_linear()
    options = ("dot_general", "promote_dtype", "preferred_element_type")
    return all(getattr(layer, option) == getattr(plain, option) for option in options)


@functools.cache
def _plain_linear() -> nnx.Linear:
    return nnx.eval_shape(lambda: nnx.Linear(1, 1, rngs=nnx.Rngs(0)))


def _matrix(variable: nnx.Variable, split: Split) -> Array:
    """Returns a kernel as W, also if it is only a shape."""
    kernel = as_array(variable.get_value())
    if isinstance(kernel, jax.ShapeDtypeStruct):
        return jax.eval_shape(split.layout.matrix, kernel)
    return split.layout.matrix(whole(kernel))


def _axes(variable: nnx.Variable) -> tuple[Any, ...]:
    """Returns the names of a kernel's axes, for sharding; None where it has none."""
    names = tuple(variable.get_metadata().get("out_sharding") or ())
    return (*names, *[None] * (variable.ndim - len(names)))


def _variable(like: nnx.Param, value: Array, names: tuple[Any, ...]) -> nnx.Param:
    """Makes a factor's variable, with the metadata of the kernel's."""
    metadata = dict(like.get_metadata())
    if metadata.get("out_sharding") is not None:
        metadata["out_sharding"] = PartitionSpec(*names)
    eager = metadata.pop("eager_sharding", False)
    if isinstance(value, jax.core.Tracer):
        return type(like)(value, eager_sharding=eager, **metadata)
    # Placed already; Flax would look for the mesh that was set when the network was made.
    made = type(like)(value, eager_sharding=False, **metadata)
    made.set_metadata(eager_sharding=eager)
    return made


def _dense(name: str, layer: LowRankLinear | FactorisedLayer) -> nnx.Module:
    """Returns the dense layer that computes the same function."""
    if isinstance(layer, FactorisedLayer):
        return layer.merged()
    try:
        W = layer.weight().astype(layer.B.dtype)
    except TypeError as error:
        raise ValueError(f"merge: {name!r} can't be merged: {error}") from None
    if layer.original is None:
        return _dense_projection(W, layer)
    rest = {} if layer.bias is None else {"bias": layer.bias[...]}
    return nnx.merge(layer.original.definition, {"kernel": W.mT, **rest})


def _dense_projection(W: Array, layer: LowRankLinear) -> Dense:
    """Makes a dense projection of a weight and the options of a low-rank one."""
    m, n = W.shape[-2:]
    spec = ProjectionSpec(dtype=layer.dtype, precision=layer.precision)
    made = nnx.eval_shape(lambda: Dense(n, m, spec, rngs=nnx.Rngs(0)))
    made.W, made.bias = nnx.Param(W), layer.bias
    return made


def _row(path: Path, layer: nnx.Module, dense: nnx.Module | None) -> Row | None:
    """Returns a layer's row of the table; None for modules that are no such layers."""
    bias = getattr(layer, "bias", None)
    entries = 0 if bias is None else int(np.prod(bias.shape))
    name = joined(path)
    if isinstance(layer, LowRankLinear | FactorisedLayer):
        *leading, m, _ = layer.B.shape
        error = None if dense is None else _error(layer, dense)
        return Row(name, tuple(leading), (m, layer.A.shape[-1]), layer.rank, entries, error)
    if isinstance(layer, Dense):
        *leading, m, n = layer.W.shape
        return Row(name, tuple(leading), (m, n), None, entries)
    try:
        split = split_of(layer)
    except ValueError:
        return None
    if split is None:
        return None
    kernel = getattr(layer, split.kernel)
    axes = (*split.layout.stack(kernel), *split.layout.sizes("b"))
    return Row(name, axes, split.layout.matrix_shape, None, entries)


def _error(layer: LowRankLinear | FactorisedLayer, dense: nnx.Module) -> float | None:
    split = split_of(dense)
    if split is None:
        return None
    return relative_error(_matrix(getattr(dense, split.kernel), split), layer.product())
