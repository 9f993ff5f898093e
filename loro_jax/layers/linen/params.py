"""Parameters of Linen networks with pairs in place of kernels, and back; their table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from loro_jax.layers.initial import initial_factors, key_of, relative_error
from loro_jax.layers.kernels import BATCH, Layout, as_array, dense_layout, product
from loro_jax.layers.linen.tree import (
    KERNEL,
    boxed_kernel,
    boxed_pair,
    has_kernel,
    has_pair,
    layers_of,
    replace_layers,
    value_of,
)
from loro_jax.layers.selection import Rank, Where, is_inclusive, resolve_rank, select
from loro_jax.layers.sharding import placed_pair, whole
from loro_jax.layers.table import Row, Summary

Array = jax.Array
Layer = Mapping[str, Any]
Layouts = Mapping[str, Layout] | None

_FACTORISE, _MERGE = "factorise_params", "merge_params"
_HOW = "layouts=kernel_layouts(model, *arguments)"


def factorise_params(
    params: Any,
    rank: Rank,
    *,
    where: Where = None,
    init: str = "auto",
    key: Array | None = None,
    layouts: Layouts = None,
) -> Any:
    """Replaces the kernels of a network by pairs, in its parameters.

    In place of "kernel", a layer has "B" (..., m, r) and "A" (..., r, n), for m outputs and n
    inputs; its bias and all other parameters stay. Factors are sharded as the kernel is. Within
    :func:`low_rank_calls` the network computes by them.

    Args:
        params: the collection "params" of a network, as nested dicts. Parameters may be boxed with
            metadata: B and A keep the names of their axes.
        rank: a whole number, a share of the smaller side as a float, or a function of path and
            shape (m, n) that returns one of both, or None for a kernel to leave as it is.
        where: which layers, by path: None (all), patterns such as ``"blocks/**"`` or ``"!head"``,
            or a predicate, called with path and kernel.
        init: "svd": the best approximation of the kernel; or a name known to
            :func:`loro_jax.initialise`, with factors of the kernel's size.
        key: random key; None: ``jax.random.key(0)``. A layer's factors depend on it and its path.
        layouts: roles of the kernels' axes, from :func:`kernel_layouts`. Without it, kernels with
            two axes are taken for (inputs, outputs), and all others are left alone.

    Returns:
        The parameters with pairs. Those given are not changed.

    Raises:
        ValueError: if a rank does not fit; ``where`` matches nothing, or a kernel that is no matrix
            or whose axes are not known; or a selected kernel is also elsewhere in the parameters.
        TypeError: if a rank is no number.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> params = {"up": {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(6)}}
        >>> jax.tree.map(jnp.shape, factorise_params(params, 2))
        {'up': {'A': (2, 4), 'B': (6, 2), 'bias': (6,)}}
    """
    chosen = _chosen(params, where, layouts)
    _check_untied(params, chosen)
    new = {}
    for path, (layer, layout) in chosen.items():
        r = resolve_rank(rank, path, layout.matrix_shape, _FACTORISE)
        if r is None:
            continue
        W = _matrix(layer, layout)
        _check_real(W, path)
        factors = initial_factors(W, r, init, key_of(key, path))
        factors = placed_pair(value_of(layer[KERNEL]), layout, *factors)
        B, A = boxed_pair(layer[KERNEL], layout, *factors)
        new[path] = _replaced(layer, {KERNEL: {"B": B, "A": A}})
    return replace_layers(params, new)


def merge_params(params: Any, *, layouts: Layouts = None) -> Any:
    """Multiplies the pairs of a network: the inverse of :func:`factorise_params`.

    Args:
        params: parameters with pairs.
        layouts: the ones used to factorise the kernels; pairs of other layers stay. Without
            it, all pairs become kernels (inputs, outputs).

    Returns:
        The parameters with kernels, in the dtype of the factors. Of several axes that had become
        one, the first keeps the name.

    Raises:
        ValueError: if there is no pair, a pair does not have the shape of its layout, or one has
            leading axes and there are no layouts.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> params = {"up": {"B": jnp.ones((6, 2)), "A": jnp.ones((2, 4)), "bias": jnp.ones(6)}}
        >>> jax.tree.map(jnp.shape, merge_params(params))
        {'up': {'bias': (6,), 'kernel': (4, 6)}}
    """
    new = {}
    for path, layer in layers_of(params).items():
        if not has_pair(layer) or (layouts is not None and path not in layouts):
            continue
        layout = _layout_of_pair(path, layer, layouts)
        W = _product(layer)
        is_shape = isinstance(W, jax.ShapeDtypeStruct)
        kernel = jax.eval_shape(layout.kernel, W) if is_shape else layout.kernel(W)
        boxed = boxed_kernel(layer["B"], layer["A"], layout, kernel)
        new[path] = _replaced(layer, {"B": {KERNEL: boxed}, "A": {}})
    if not new:
        raise ValueError(f"{_MERGE}: the parameters have no pair to merge.")
    return replace_layers(params, new)


def summary_params(params: Any, *, layouts: Layouts = None, dense: Any = None) -> Summary:
    """Returns the table of a network's layers from its parameters.

    Args:
        params: parameters with pairs, kernels, or both. They may be ``jax.ShapeDtypeStruct``.
        layouts: roles of the kernels' axes, from :func:`kernel_layouts`. Without it, kernels with
            other than two axes are no layers.
        dense: parameters before :func:`factorise_params`, for the relative errors of the products.

    Returns:
        The table; printing it shows all.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"up": {"kernel": jnp.ones((40, 60)), "bias": jnp.ones(60)}}
        >>> pairs = factorise_params(params, 1, init="svd")
        >>> print(summary_params(pairs, dense=params))
        layer   shape    rank  parameters  now  FLOPs a token  now  relative error
        up      60 x 40  1     2,460       160  14,400         600  0.00%
        others                 0           0
        total                  2,460       160  14,400         600
    """
    before = {} if dense is None else layers_of(dense)
    rows = list(_rows(layers_of(params), layouts, before))
    held = sum(int(np.prod(np.shape(leaf))) for leaf in jax.tree.leaves(params))
    return Summary(tuple(rows), held - sum(row.after for row in rows))


def _rows(
    layers: Mapping[str, Layer], layouts: Layouts, before: Mapping[str, Layer]
) -> Iterator[Row]:
    for path, layer in layers.items():
        bias = int(np.prod(np.shape(value_of(layer["bias"])))) if "bias" in layer else 0
        if has_pair(layer):
            B, A = value_of(layer["B"]), value_of(layer["A"])
            m, r, n = B.shape[-2], B.shape[-1], A.shape[-1]
            error = _error(path, layer, before, layouts)
            yield Row(path, tuple(B.shape[:-2]), (m, n), r, bias, error)
        elif layout := _layout_of_kernel(path, layer, layouts):
            stack = layout.stack(value_of(layer[KERNEL]))
            yield Row(path, (*stack, *layout.sizes(BATCH)), layout.matrix_shape, None, bias)


def _error(path: str, layer: Layer, before: Mapping[str, Layer], layouts: Layouts) -> float | None:
    """Returns the relative error of a pair's product; None: the kernel is not known."""
    known = before.get(path)
    layout = None
    if known is not None and has_kernel(known):
        layout = _layout_of_kernel(path, known, layouts)
    if known is None or layout is None:
        return None
    return relative_error(_matrix(known, layout), _product(layer))


def _chosen(params: Any, where: Where, layouts: Layouts) -> dict[str, tuple[Layer, Layout]]:
    """Returns the selected layers and their layouts, by path."""
    layers = {path: layer for path, layer in layers_of(params).items() if has_kernel(layer)}
    unknown = sorted(set(layouts or ()) - set(layers_of(params)))
    if unknown:
        raise ValueError(
            f"{_FACTORISE}: layouts has {unknown[0]!r}, which the parameters don't have; expected "
            'those of the same network, variables["params"].'
        )
    kernels = {path: value_of(layer[KERNEL]) for path, layer in layers.items()}
    known = {path: _layout_of_kernel(path, layers[path], layouts) for path in kernels}
    chosen = {}
    for path in select(kernels, where, _FACTORISE):
        layout = known[path]
        if layout is not None:
            chosen[path] = (layers[path], layout)
        elif is_inclusive(where):
            raise ValueError(_no_layout(path, kernels[path].shape, layouts))
    if not chosen:
        raise ValueError(
            f"{_FACTORISE}: no kernel of the parameters is known to be a matrix: expected a layer "
            f"with a kernel (inputs, outputs), or {_HOW}."
        )
    return chosen


def _no_layout(path: str, shape: tuple[int, ...], layouts: Layouts) -> str:
    kernel = f"{_FACTORISE}: the kernel of {path!r}, of shape {tuple(shape)},"
    if len(shape) < 2:
        return f"{kernel} is no matrix; leave it out: where='!{path}'."
    if layouts is None:
        return (
            f"{kernel} does not say which of its axes are inputs; pass {_HOW}, or leave it out: "
            f"where='!{path}'."
        )
    return (
        f"{kernel} is no matrix by the layouts: expected a Dense, DenseGeneral or Einsum, or a "
        f"Conv without groups and mask; leave it out: where='!{path}'."
    )


def _layout_of_kernel(path: str, layer: Layer, layouts: Layouts) -> Layout | None:
    """Returns the layout of a kernel; None: it is not known."""
    shape = tuple(value_of(layer[KERNEL]).shape)
    if layouts is None:
        return dense_layout((shape[0], shape[1])) if len(shape) == 2 else None
    layout = layouts.get(path)
    if layout is not None and shape[len(shape) - len(layout.shape) :] != layout.shape:
        raise ValueError(
            f"{_FACTORISE}: the kernel of {path!r} has shape {shape}, but its layout is for "
            f"{layout.shape}, before which only axes of a stack may come; expected the layouts of "
            "the same network, stacked by nn.scan or nn.vmap with variable_axes={'params': 0}."
        )
    return layout


def _layout_of_pair(path: str, layer: Layer, layouts: Layouts) -> Layout:
    B, A = value_of(layer["B"]), value_of(layer["A"])
    if layouts is None:
        if B.ndim > 2:
            raise ValueError(
                f"{_MERGE}: the pair of {path!r} has B of shape {tuple(B.shape)}, which does not "
                f"say what its leading axes are; pass {_HOW}."
            )
        return dense_layout((A.shape[-1], B.shape[-2]))
    layout = layouts[path]
    m, n = layout.matrix_shape
    batch = layout.sizes(BATCH)
    leading = tuple(B.shape[:-2])
    if (B.shape[-2], A.shape[-1]) != (m, n) or leading[len(leading) - len(batch) :] != batch:
        raise ValueError(
            f"{_MERGE}: the pair of {path!r} has B of shape {tuple(B.shape)} and A of shape "
            f"{tuple(A.shape)}, but its layout is for {n} inputs and {m} outputs."
        )
    return layout


def _matrix(layer: Layer, layout: Layout) -> Any:
    """Returns the kernel of a layer as a matrix, or only its shape and dtype."""
    kernel = as_array(value_of(layer[KERNEL]))
    if isinstance(kernel, jax.ShapeDtypeStruct):
        return jax.eval_shape(layout.matrix, kernel)
    return layout.matrix(whole(kernel))


def _product(layer: Layer) -> Any:
    """Returns the product of a layer's pair in the dtype of B, computed in float32 or wider."""

    def multiply(B: Array, A: Array) -> Array:
        return product(B, A).astype(B.dtype)

    B, A = as_array(value_of(layer["B"])), as_array(value_of(layer["A"]))
    if isinstance(B, jax.ShapeDtypeStruct):
        return jax.eval_shape(multiply, B, A)
    return multiply(B, A)


def _replaced(layer: Layer, entries: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Returns the entries of a layer with others in the place of some, in their order."""
    new: dict[str, Any] = {}
    for name, value in layer.items():
        new |= entries.get(name, {name: value})
    return new


def _check_real(W: Any, path: str) -> None:
    if not jnp.issubdtype(W.dtype, jnp.floating):
        raise ValueError(
            f"{_FACTORISE}: the kernel of {path!r} has the dtype {W.dtype}; expected a real "
            f"floating-point one, or where='!{path}'."
        )


def _check_untied(params: Any, chosen: Mapping[str, tuple[Layer, Layout]]) -> None:
    """Raises ValueError if a selected kernel is a parameter of another layer, too."""
    places: dict[int, list[str]] = {}
    for place, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        # Shapes alone may be one object without being tied.
        if isinstance(leaf, jax.Array | np.ndarray):
            places.setdefault(id(leaf), []).append(jax.tree_util.keystr(place))
    for path, (layer, _) in chosen.items():
        found = places.get(id(value_of(layer[KERNEL])), [])
        if len(found) > 1:
            raise ValueError(
                f"{_FACTORISE}: the kernel of {path!r} is one array at {' and '.join(found)}: tied "
                f"weights, which pairs would part; leave it out, where='!{path}', or pass copies."
            )
