"""Equinox: turns ``eqx.nn.Linear`` and ``eqx.nn.Conv`` of any PyTree into pairs, and back."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from loro_jax.layers.initial import initial_factors, key_of, relative_error
from loro_jax.layers.kernels import Layout, as_array, product
from loro_jax.layers.selection import Rank, Where, is_inclusive, resolve_rank, select
from loro_jax.layers.sharding import placed_pair, whole
from loro_jax.layers.table import Row, Summary
from loro_jax.lowrank import initialise

Array = jax.Array

_EXPECTED = "expected an eqx.nn.Linear, or an eqx.nn.Conv without groups"


class LowRankLinear(eqx.Module):
    """``y = B (A x) + bias``, called like ``eqx.nn.Linear``; ``B A`` is never formed.

    Attributes:
        B: (out, r), with the leading axes of a stack.
        A: (r, in), with the same.
        bias: (out,), with the same; None: none.
        in_features: size of the input.
        out_features: size of the output.
        use_bias: whether there is a bias.
        dense_class: class of the dense layer, which :func:`merge` restores.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> layer = LowRankLinear(64, 32, rank=8, key=jax.random.key(0))
        >>> layer(jnp.ones(64)).shape, layer.B.shape, layer.A.shape
        ((32,), (32, 8), (8, 64))
    """

    B: Array
    A: Array
    bias: Array | None
    in_features: int = eqx.field(static=True)
    out_features: int = eqx.field(static=True)
    use_bias: bool = eqx.field(static=True)
    dense_class: type[eqx.Module] = eqx.field(static=True)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        use_bias: bool = True,
        dtype: Any = None,
        init: str = "auto",
        *,
        key: Array,
    ):
        """Draws the factors at the scale of ``eqx.nn.Linear``, without a dense weight.

        Args:
            in_features: size of the input.
            out_features: size of the output.
            rank: r.
            use_bias: whether to add a bias.
            dtype: dtype of factors and bias; None: JAX's default.
            init: a name known to :func:`loro_jax.initialise`.
            key: JAX random key.

        Raises:
            ValueError: as :func:`loro_jax.initialise`.
        """
        dtype = jnp.result_type(float) if dtype is None else dtype
        key_factors, key_bias = jax.random.split(key)
        limit = 1 / math.sqrt(max(1, in_features))
        # Dense entries are uniform between -limit and limit.
        deviation = limit / math.sqrt(3)
        B, A = initialise(key_factors, out_features, in_features, rank, init, deviation)
        self.B, self.A = B.astype(dtype), A.astype(dtype)
        draw = jax.random.uniform(key_bias, (out_features,), jnp.float32, -limit, limit)
        self.bias = draw.astype(dtype) if use_bias else None
        self.in_features, self.out_features = in_features, out_features
        self.use_bias = use_bias
        self.dense_class = eqx.nn.Linear

    @property
    def rank(self) -> int:
        """The rank r."""
        return self.A.shape[-2]

    def product(self) -> Array:
        """Returns B A, (..., out, in), in float32 or wider."""
        return _product(self)

    @jax.named_scope("LowRankLinear")
    def __call__(self, x: Array, *, key: Array | None = None) -> Array:
        """Maps a vector (in,) to (out,); ``key`` is ignored, as by ``eqx.nn.Linear``."""
        y = self.B @ (self.A @ x)
        return y if self.bias is None else y + self.bias


class LowRankConv(eqx.Module):
    """A convolution to r channels and a product with B, called like ``eqx.nn.Conv``.

    Attributes:
        B: (out, r), with the leading axes of a stack.
        A: (r, in * window), with the same.
        bias: as in ``eqx.nn.Conv``, and so are all further attributes but the last.
        dense_class: class of the dense layer, which :func:`merge` restores.
    """

    B: Array
    A: Array
    bias: Array | None
    num_spatial_dims: int = eqx.field(static=True)
    in_channels: int = eqx.field(static=True)
    out_channels: int = eqx.field(static=True)
    kernel_size: tuple[int, ...] = eqx.field(static=True)
    stride: tuple[int, ...] = eqx.field(static=True)
    padding: Any = eqx.field(static=True)
    dilation: tuple[int, ...] = eqx.field(static=True)
    groups: int = eqx.field(static=True)
    use_bias: bool = eqx.field(static=True)
    padding_mode: str = eqx.field(static=True)
    dense_class: type[eqx.Module] = eqx.field(static=True)

    @property
    def rank(self) -> int:
        """The rank r."""
        return self.A.shape[-2]

    def product(self) -> Array:
        """Returns B A, (..., out, in * window), in float32 or wider."""
        return _product(self)

    @jax.named_scope("LowRankConv")
    def __call__(self, x: Array, *, key: Array | None = None) -> Array:
        """Maps (in, *space) to (out, *space); ``key`` is ignored, as by ``eqx.nn.Conv``."""
        window = self.A.reshape(self.rank, self.in_channels, *self.kernel_size)
        # Equinox's own convolution does the padding.
        shape = {**_settings(self), "out_channels": self.rank, "use_bias": False}
        y = _made(eqx.nn.Conv, weight=window, bias=None, **shape)(x)
        y = jnp.tensordot(self.B, y, 1)
        return y if self.bias is None else y + self.bias


_DENSE = (eqx.nn.Linear, eqx.nn.Conv)
_LOW_RANK = (LowRankLinear, LowRankConv)


def factorise(
    tree: Any,
    rank: Rank,
    *,
    where: Where = None,
    init: str = "auto",
    key: Array | None = None,
) -> Any:
    """Returns a copy of a network in which the selected layers are low-rank.

    ``eqx.nn.Linear`` becomes :class:`LowRankLinear`, and ``eqx.nn.Conv`` without groups becomes
    :class:`LowRankConv`, wherever they are in the tree. A layer that ``eqx.filter_vmap`` has
    stacked becomes a stack of pairs. All else is left as it is: layers with "scalar" features, of a
    subclass with another ``__call__`` or other fields, or whose weight ``eqx.nn.WeightNorm``,
    ``eqx.nn.SpectralNorm`` or ``eqx.nn.Shared`` reads. :func:`loro_jax.loro` finds the pairs
    automatically.

    Args:
        tree: any PyTree; arrays may be ``jax.ShapeDtypeStruct``, which gives pairs of such.
        rank: a whole number, a share of the smaller side as a float, or a function of path and
            shape (out, in) that returns one of both, or None for a layer to leave dense. For a
            convolution, in is channels times window.
        where: the layers, see :func:`loro_jax.layers.selection.select`; paths are names of fields,
            indices and keys, such as "blocks/0/attn/qkv". None: all that can be factorised.
        init: "svd": the best approximations of the present weights. Or a name known to
            :func:`loro_jax.initialise`, at the size of these weights.
        key: JAX random key of the new factors; None: a fixed one. Each layer's depends on its path.

    Returns:
        The network with pairs.

    Raises:
        ValueError: if a rank does not fit, ``where`` matches no layer or selects one that cannot be
            factorised, or a selected weight is in another place of the tree, too.
        TypeError: if a rank is no number.

    Example:
        >>> import equinox as eqx, jax
        >>> mlp = eqx.nn.MLP(16, 4, 64, depth=2, key=jax.random.key(0))
        >>> summary(factorise(mlp, 8, where="!layers/2"))
        layer     shape    rank   parameters  now    FLOPs a token  now
        layers/0  64 x 16  8      1,088       704    6,144          3,840
        layers/1  64 x 64  8      4,160       1,088  24,576         6,144
        layers/2  4 x 64   dense  260         260    1,536          1,536
        others                    0           0
        total                     5,508       2,052  32,256         11,520
    """
    paths, nodes, structure = _flattened(tree)
    layers = {path: node for path, node in zip(paths, nodes, strict=True) if _is_layer(node)}
    obstacles = {path: _obstacle(layer) for path, layer in layers.items()}
    obstacles.update(_read_by_others(tree))
    chosen = select(layers, where, "factorise")
    for path in chosen:
        if obstacles[path] is not None and is_inclusive(where):
            raise ValueError(
                f"factorise: {path!r} {obstacles[path]}; {_EXPECTED}; leave it out: "
                f"where='!{path}'."
            )
    chosen = [path for path in chosen if obstacles[path] is None]
    if not chosen:
        raise ValueError(f"factorise: no layer of the network can be factorised; {_EXPECTED}.")
    _refuse_tied(tree, {path: layers[path] for path in chosen})
    low_rank = {}
    for path in chosen:
        r = resolve_rank(rank, path, _layout(layers[path]).matrix_shape, "factorise")
        if r is not None:
            low_rank[path] = _low_rank(layers[path], r, init, key_of(key, path))
    new = [low_rank.get(path, node) for path, node in zip(paths, nodes, strict=True)]
    return jax.tree.unflatten(structure, new)


def merge(tree: Any) -> Any:
    """Returns a copy of a network in which all pairs are dense layers again.

    Args:
        tree: any PyTree with layers that :func:`factorise` has made.

    Returns:
        The network with ``B A`` as weights, computed in float32 or wider, in the dtype of the
        factors; its structure is that before :func:`factorise`.

    Example:
        >>> import equinox as eqx, jax
        >>> linear = eqx.nn.Linear(16, 4, key=jax.random.key(0))
        >>> merged = merge(factorise(linear, 4, init="svd"))
        >>> jax.tree.structure(merged) == jax.tree.structure(linear)
        True
        >>> bool(jnp.allclose(merged.weight, linear.weight, atol=1e-6))
        True
    """

    def dense(node: Any) -> Any:
        if not isinstance(node, _LOW_RANK):
            return node
        layout, dtype = _layout(node), node.B.dtype
        weight = _mapped(lambda W: layout.kernel(W).astype(dtype), node.product())
        return _made(node.dense_class, weight=weight, bias=node.bias, **_settings(node))

    return jax.tree.map(dense, tree, is_leaf=_is_layer)


def summary(tree: Any, dense: Any = None) -> Summary:
    """Returns a table of the layers that are, or could be, low-rank; printing shows it.

    Args:
        tree: any PyTree.
        dense: the network before :func:`factorise`, for the relative error of each product.

    Returns:
        The table; other parameters are those of all other floating-point arrays of the tree.

    Raises:
        ValueError: if ``dense`` has no layer of the same shape at the path of a pair.
    """
    before = {} if dense is None else dict(_layers(dense))
    rows = []
    for path, layer in _layers(tree):
        low_rank = isinstance(layer, _LOW_RANK)
        if not low_rank and not _has_its_weight(layer):
            continue
        layout = _layout(layer)
        leading = layer.B.shape[:-2] if low_rank else layout.stack(layer.weight)
        rows.append(
            Row(
                path,
                tuple(leading),
                layout.matrix_shape,
                rank=layer.rank if low_rank else None,
                bias=_inexact_size(layer.bias),
                error=_error(path, layer, before) if low_rank and dense is not None else None,
            )
        )
    return Summary(tuple(rows), others=_inexact_size(tree) - sum(row.after for row in rows))


def _low_rank(layer: Any, rank: int, init: str, key: Array) -> Any:
    """Returns a dense layer as a pair."""
    layout, weight = _layout(layer), as_array(layer.weight)
    W = _mapped(lambda weight: layout.matrix(whole(weight)), weight)
    B, A = placed_pair(weight, layout, *initial_factors(W, rank, init, key))
    new_class = LowRankLinear if isinstance(layer, eqx.nn.Linear) else LowRankConv
    return _made(new_class, B=B, A=A, bias=layer.bias, dense_class=type(layer), **_settings(layer))


def _made(layer_class: type, **fields: Any) -> Any:
    """Returns a module with these fields, as unflattening a tree does: nothing is drawn."""
    layer: Any = object.__new__(layer_class)
    for name, value in fields.items():
        object.__setattr__(layer, name, value)
    return layer


def _settings(layer: Any) -> dict[str, Any]:
    """Returns the fields that a dense layer and its pair have in common, without the bias."""
    own = {"weight", "B", "A", "bias", "dense_class"}
    return {f.name: getattr(layer, f.name) for f in dataclasses.fields(layer) if f.name not in own}


def _layout(layer: Any) -> Layout:
    """Returns the layout of a dense layer's weight, or of that of the product."""
    if isinstance(layer, eqx.nn.Linear | LowRankLinear):
        sizes = (layer.out_features, layer.in_features)
        return Layout(tuple(1 if n == "scalar" else n for n in sizes), "oi")
    inputs = (layer.in_channels // layer.groups, *layer.kernel_size)
    return Layout((layer.out_channels, *inputs), "o" + "i" * len(inputs))


def _product(layer: Any) -> Array:
    return _mapped(product, layer.B, layer.A)


def _mapped(fn: Callable, *arrays: Any) -> Any:
    """Applies a function of arrays, or to their shapes and dtypes alone."""
    abstract = any(isinstance(x, jax.ShapeDtypeStruct) for x in arrays)
    return jax.eval_shape(fn, *arrays) if abstract else fn(*arrays)


# Which layers there are.


def _is_layer(node: Any) -> bool:
    return isinstance(node, (*_DENSE, *_LOW_RANK))


def _flattened(tree: Any) -> tuple[list[str], list[Any], Any]:
    """Returns paths, layers among other leaves, and the structure of a tree."""
    found, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_layer)
    return [_joined(path) for path, _ in found], [node for _, node in found], structure


def _layers(tree: Any) -> Iterator[tuple[str, Any]]:
    paths, nodes, _ = _flattened(tree)
    yield from ((p, node) for p, node in zip(paths, nodes, strict=True) if _is_layer(node))


def _joined(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray | jax.ShapeDtypeStruct)


def _inexact_size(tree: Any) -> int:
    """Returns the number of entries of all inexact arrays of a tree."""
    arrays = filter(_is_array, jax.tree.leaves(tree))
    return sum(math.prod(x.shape) for x in arrays if jnp.issubdtype(x.dtype, jnp.inexact))


def _has_its_weight(layer: Any) -> bool:
    """Returns whether the weight is an inexact array of the shape that the layer's fields say."""
    weight, shape = layer.weight, _layout(layer).shape
    if not _is_array(weight) or not jnp.issubdtype(weight.dtype, jnp.inexact):
        return False
    return len(weight.shape) >= len(shape) and tuple(weight.shape[-len(shape) :]) == shape


def _obstacle(layer: Any) -> str | None:
    """Returns why a layer cannot become low-rank; None if it can."""
    name = type(layer).__name__
    if isinstance(layer, _LOW_RANK):
        return "is low-rank already: merge it first"
    base = eqx.nn.Linear if isinstance(layer, eqx.nn.Linear) else eqx.nn.Conv
    if type(layer).__call__ is not base.__call__:
        return f"has the class {name}, with another __call__"
    if {f.name for f in dataclasses.fields(layer)} != {f.name for f in dataclasses.fields(base)}:
        return f"has the class {name}, with other fields"
    if "scalar" in _settings(layer).values():
        return 'has "scalar" features, so that its weight is a vector'
    if getattr(layer, "groups", 1) != 1:
        return f"is a convolution with {layer.groups} groups"
    if not _is_array(layer.weight):
        return f"has no array as its weight, but {layer.weight!r}"
    shape = " x ".join(map(str, _layout(layer).shape))
    if not _has_its_weight(layer) or not jnp.issubdtype(layer.weight.dtype, jnp.floating):
        found = " x ".join(map(str, layer.weight.shape))
        return f"has a weight of {found}, {layer.weight.dtype}, in place of {shape}, real"
    if math.prod(_layout(layer).shape) == 0:
        return f"has an empty weight, {shape}"
    return None


def _refuse_tied(tree: Any, chosen: dict[str, Any]) -> None:
    """Raises ValueError if the weight of a chosen layer is in two places of the tree."""
    places: dict[int, list[str]] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if isinstance(leaf, jax.Array | np.ndarray):
            places.setdefault(id(leaf), []).append(_joined(path))
    for of_layer, layer in chosen.items():
        own = f"{of_layer}/weight".lstrip("/")
        others = [place for place in places.get(id(layer.weight), []) if place != own]
        if others:
            raise ValueError(
                f"factorise: {own!r} and {others[0]!r} are the same array, which Equinox would "
                "train as two; expected one place: tie whole layers by eqx.nn.Shared, or leave the "
                f"layer out: where='!{of_layer}'."
            )


def _read_by_others(tree: Any, prefix: tuple = ()) -> Iterator[tuple[str, str]]:
    """Yields paths of layers whose weight is used outside of them by its name, and by whom."""
    normalised = (eqx.nn.WeightNorm, eqx.nn.SpectralNorm)

    def is_leaf(node: Any) -> bool:
        return isinstance(node, (*normalised, eqx.nn.Shared))

    for path, node in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)[0]:
        here = (*prefix, *path)
        if isinstance(node, eqx.nn.Shared):
            yield from _tied_by(node, here)
            yield from _read_by_others(node.pytree, (*here, jax.tree_util.GetAttrKey("pytree")))
        elif isinstance(node, normalised):
            layer = _joined((*here, jax.tree_util.GetAttrKey("layer")))
            if _is_layer(node.layer) and node.weight_name == "weight":
                yield layer, f"has a weight that eqx.nn.{type(node).__name__} normalises"


def _tied_by(shared: eqx.nn.Shared, prefix: tuple) -> Iterator[tuple[str, str]]:
    """Yields the layers that can't be pairs: ``shared`` ties their weights, not the layers."""
    found, structure = jax.tree_util.tree_flatten_with_path(shared, is_leaf=_is_layer)
    nodes = [node for _, node in found]
    for i, (path, layer) in enumerate(found):
        if not _is_layer(layer) or _obstacle(layer) is not None:
            continue
        pair = eqx.filter_eval_shape(_low_rank, layer, 1, "lora", jax.random.key(0))
        tried = jax.tree.unflatten(structure, [*nodes[:i], pair, *nodes[i + 1 :]])
        try:
            eqx.filter_eval_shape(lambda shared: shared(), tried)
        except AttributeError:  # it asks for `weight`
            yield _joined((*prefix, *path)), "has a weight that eqx.nn.Shared ties to another"


def _error(path: str, layer: Any, dense: dict[str, Any]) -> float | None:
    """Returns the relative error of a product; None if there are only shapes."""
    layout, before = _layout(layer), dense.get(path)
    fits = isinstance(before, _DENSE) and _has_its_weight(before) and _layout(before) == layout
    if before is None or not fits:
        raise ValueError(
            f"summary: expected the dense layer of {path!r} at this path of `dense`, of shape "
            f"{' x '.join(map(str, layout.shape))}, but found {type(before).__name__}."
        )
    W, product = before.weight, layer.product()
    if isinstance(W, jax.ShapeDtypeStruct) or isinstance(product, jax.ShapeDtypeStruct):
        return None
    return relative_error(layout.matrix(as_array(W)), product)
