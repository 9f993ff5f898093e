"""Adds adapters to any Flax NNX network, and merges them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import jax
from flax import nnx

from loro_jax.layers.adapters.adapter import AdaptedLinear, Adapter, weight_of
from loro_jax.layers.adapters.freezing import freeze, unfreeze
from loro_jax.layers.adapters.spec import AdapterSpec
from loro_jax.layers.adapters.table import ADAPTERS
from loro_jax.layers.dense import Dense
from loro_jax.layers.initial import key_of
from loro_jax.layers.low_rank import LowRankLinear
from loro_jax.layers.nnx import merge
from loro_jax.layers.places import Path, modules, put_everywhere
from loro_jax.layers.selection import Where, joined, select

Array = jax.Array
Model = TypeVar("Model", bound=nnx.Module)

# Layers that map (..., in) to (..., out) by a matrix.
_LAYERS = (Dense, LowRankLinear, nnx.Linear)


def adapt(
    model: Model,
    spec: AdapterSpec,
    *,
    where: Where = None,
    trained: Sequence[str] = (),
    key: Array | None = None,
    in_place: bool = False,
) -> Model:
    """Adds an adapter to layers of a network, and fixes everything else.

    A layer becomes an :class:`AdaptedLinear`, called as before. ``nnx.Linear`` and the projections
    of :mod:`loro_jax.layers` can be adapted; stacks of layers, as made by ``nnx.vmap``, have an
    adapter each. ``nnx.state(model, nnx.Param)`` holds then what is trained; parameters of the
    given network have become :class:`~loro_jax.layers.common.Fixed`.

    Args:
        model: the network, its arrays also abstract (``nnx.eval_shape``) or traced.
        spec: kind and rank of the adapters.
        where: which layers: None for all, a pattern or several ("**/query", "!head"), or a
            predicate of path and layer. See :func:`loro_jax.layers.selection.select`.
        trained: patterns of further variables or modules that stay trained, such as "head" or
            "**/bias".
        key: JAX random key; None: ``jax.random.key(0)``.
        in_place: whether to change ``model`` itself.

    Returns:
        The adapted network; ``model`` itself if ``in_place``.

    Raises:
        ValueError: for an unknown kind, a rank above the smaller side of a matrix, a pattern that
            matches nothing, or a network that is adapted already.

    Example:
        >>> import jax.numpy as jnp
        >>> rngs = nnx.Rngs(0)
        >>> model = nnx.Sequential(nnx.Linear(64, 32, rngs=rngs), nnx.Linear(32, 10, rngs=rngs))
        >>> adapted = adapt(model, AdapterSpec(rank=4), where="layers/0", trained=["layers/1"])
        >>> jax.tree.map(jnp.shape, nnx.to_pure_dict(nnx.state(adapted, nnx.Param))["layers"])
        {0: {'adapter': {'A': (4, 64), 'B': (32, 4)}}, 1: {'bias': (10,), 'kernel': (32, 10)}}
        >>> x = jnp.ones((5, 64))
        >>> bool(jnp.all(adapted(x) == model(x)))
        True
    """
    if spec.kind not in ADAPTERS:
        raise ValueError(f"adapt: kind must be one of {', '.join(ADAPTERS)}, but is {spec.kind!r}.")
    changed = model if in_place else nnx.clone(model)
    if any(isinstance(module, AdaptedLinear) for _, module in modules(changed)):
        raise ValueError("adapt: the network has adapters already; expected merge_adapters first.")
    found = {joined(p): (p, m) for p, m in modules(changed) if isinstance(m, _LAYERS)}
    chosen = select({name: layer for name, (_, layer) in found.items()}, where, "adapt")
    # All is checked before anything is changed.
    for name in chosen:
        _check_rank(name, found[name][1], spec)
    duplicates = nnx.find_duplicates(changed)
    for name in chosen:
        path, layer = found[name]
        adapted = AdaptedLinear(layer, _make(layer, spec, key_of(key, name)))
        changed = put_everywhere(changed, path, duplicates, adapted)
    if in_place and changed is not model:
        raise ValueError("adapt: the network is a single layer, which can't change in place.")
    if spec.absorbs:
        absorb(changed)
    freeze(changed, _trained(changed, trained))
    return changed


def absorb(model: nnx.Module) -> None:
    """Subtracts each adapter's dW from the weight of its layer, in place.

    To be called once, when the weights of the network have been replaced by those to start from:
    :func:`adapt` has done it with the weights that were there.

    Args:
        model: a network with adapters.

    Raises:
        ValueError: if the weight of an adapted layer is a product, which can't absorb another.

    Example:
        >>> import jax.numpy as jnp
        >>> model = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
        >>> adapted = adapt(model, AdapterSpec(rank=2, initialiser="xavier"))
        >>> bool(jnp.abs(adapted.adapter.B[...]).min() > 0)
        True
        >>> x = jnp.ones((3, 8))
        >>> bool(jnp.allclose(adapted(x), model(x), atol=1e-6))
        True
    """
    for path, layer in modules(model):
        if not isinstance(layer, AdaptedLinear):
            continue
        if not isinstance(layer.base, Dense | nnx.Linear):
            raise ValueError(
                f"adapt: the weight of {joined(path)!r} is a product of factors, which can't "
                "absorb that of an adapter; expected initialiser = None."
            )
        W = weight_of(layer.base)
        _set_weight(layer.base, W - layer.adapter.weight(W))


def merge_adapters(model: Model, *, in_place: bool = False) -> Model:
    """Adds each adapter's change to the weight of its layer, and makes everything trainable.

    Args:
        model: a network from :func:`adapt`.
        in_place: whether to change ``model`` itself.

    Returns:
        The network without adapters. A layer whose weight is a product B A becomes dense.

    Example:
        >>> import jax.numpy as jnp
        >>> model = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
        >>> adapted = adapt(model, AdapterSpec(rank=2, initialiser="xavier"))
        >>> x = jnp.ones((3, 8))
        >>> bool(jnp.allclose(merge_adapters(adapted)(x), adapted(x), atol=1e-6))
        True
    """
    changed = model if in_place else nnx.clone(model)
    duplicates = nnx.find_duplicates(changed)
    found = [(p, m) for p, m in modules(changed) if isinstance(m, AdaptedLinear)]
    for path, layer in found:
        changed = put_everywhere(changed, path, duplicates, _merged(layer))
    if in_place and changed is not model:
        raise ValueError(
            "merge_adapters: the network is a single layer, which can't change in place."
        )
    unfreeze(changed)
    return changed


def _merged(layer: AdaptedLinear) -> nnx.Module:
    W = layer.weight()
    base = layer.base if isinstance(layer.base, Dense | nnx.Linear) else merge(layer.base)
    _set_weight(base, W)
    return base


def _set_weight(layer: Any, W: Array) -> None:
    """Sets the weight of a dense layer, (..., out, in)."""
    variable = layer.kernel if isinstance(layer, nnx.Linear) else layer.W
    variable[...] = (W.mT if isinstance(layer, nnx.Linear) else W).astype(variable.dtype)


def _check_rank(name: str, layer: nnx.Module, spec: AdapterSpec) -> None:
    *_, m, n = shape_of(layer)
    if not 1 <= spec.rank <= min(m, n):
        raise ValueError(
            f"adapt: rank = {spec.rank} of {name!r}, {n} inputs to {m} outputs, must be between 1 "
            f"and {min(m, n)}."
        )


def shape_of(layer: Any) -> tuple[int, ...]:
    """Returns the shape of a layer's weight, (..., out, in)."""
    if isinstance(layer, nnx.Linear):
        *leading, n, m = layer.kernel.shape
        return (*leading, m, n)
    if isinstance(layer, LowRankLinear):
        return (*layer.B.shape[:-1], layer.A.shape[-1])
    return layer.W.shape


def _make(layer: nnx.Module, spec: AdapterSpec, key: Array) -> Adapter:
    """Makes the adapter of a layer, or those of a stack of layers."""
    *leading, m, n = shape_of(layer)

    def make(rngs: nnx.Rngs) -> Adapter:
        return ADAPTERS[spec.kind](n, m, spec, rngs)

    for size in reversed(leading):
        make = nnx.split_rngs(splits=size)(nnx.vmap(make, in_axes=0, out_axes=0))
    return make(nnx.Rngs(params=key))


def _trained(model: nnx.Module, patterns: Sequence[str]) -> Any:
    """Returns a function of a variable's path: whether the variable is trained."""
    adapters = {path for path, m in modules(model) if isinstance(m, Adapter)}
    chosen: set[str] = set()
    if patterns:
        state = nnx.to_flat_state(nnx.state(model, nnx.Param))
        names = {joined(path): None for path, _ in state if not _within(path, adapters)}
        chosen = set(select(names, list(patterns), "adapt (trained)"))
    return lambda path: _within(path, adapters) or joined(path) in chosen


def _within(path: Path, places: set[Path]) -> bool:
    return any(path[:end] in places for end in range(len(path)))
