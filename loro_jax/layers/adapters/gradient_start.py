"""Starts adapters from a gradient of the weights that they change."""

from __future__ import annotations

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from loro_jax.layers.adapters.adapt import shape_of
from loro_jax.layers.adapters.adapter import AdaptedLinear, Adapter
from loro_jax.layers.adapters.freezing import freeze
from loro_jax.layers.places import modules
from loro_jax.layers.selection import joined

Array = jax.Array
Model = TypeVar("Model", bound=nnx.Module)


class Probe(Adapter):
    """A dense ``dW`` of zeros, whose gradient is that of the weight, whatever the base is.

    Args:
        layer: an adapted layer; dW has the dtype of what its adapter trains.
    """

    def __init__(self, layer: AdaptedLinear):
        dtype = jnp.result_type(*jax.tree.leaves(nnx.state(layer.adapter, nnx.Param)))
        self.W = nnx.Param(jnp.zeros(shape_of(layer.base), dtype))

    def __call__(self, x: Array, base: nnx.Module) -> Array:
        """Maps (..., in) to (..., out)."""
        return x @ self.W[...].astype(x.dtype).T

    def weight(self, W: Array) -> Array:
        """Returns dW."""
        return self.W[...]


def probed(model: Model) -> Model:
    """Returns a copy of an adapted network whose only parameters are dense changes of zero.

    Their gradients are those of the weights that its adapters change, (..., out, in): pass them to
    :func:`start_from_gradients`.

    Args:
        model: a network from :func:`loro_jax.layers.adapters.adapt`.
    """
    changed = nnx.clone(model)
    for _, layer in modules(changed):
        if isinstance(layer, AdaptedLinear):
            layer.adapter = Probe(layer)
    probes = {path for path, m in modules(changed) if isinstance(m, Probe)}
    freeze(changed, lambda path: path[:-1] in probes)
    return changed


def start_from_gradients(model: nnx.Module, gradients: Any, rate: float) -> None:
    """Starts those adapters that have such a start from the gradients of their weights, in place.

    Args:
        model: a network from :func:`loro_jax.layers.adapters.adapt`, before training.
        gradients: gradients of the parameters of :func:`probed`, averaged over some batches (50 to
            170 sequences in the paper of LoRA-SB): an ``nnx.State``, or its nested dict.
        rate: size of the first step, of every entry of the weights: the learning rate divided by
            the steps of its warm-up.

    Raises:
        ValueError: if a gradient is missing or has another shape than its weight.

    Example:
        >>> from loro_jax.layers.adapters import AdapterSpec, adapt
        >>> layers = nnx.Linear(8, 6, rngs=nnx.Rngs(0)), nnx.Linear(6, 4, rngs=nnx.Rngs(1))
        >>> model = adapt(nnx.Sequential(*layers), AdapterSpec(kind="lora_sb", rank=2))
        >>> loss = lambda model: jnp.mean(model(jnp.ones((3, 8))) ** 2)
        >>> before = loss(model)
        >>> start_from_gradients(model, nnx.grad(loss)(probed(model)), rate=0.01)
        >>> bool(loss(model) < before)
        True
    """
    if isinstance(gradients, nnx.State):
        gradients = nnx.to_pure_dict(gradients)
    for path, layer in modules(model):
        if not isinstance(layer, AdaptedLinear) or not layer.adapter.starts_from_gradient:
            continue
        found: Any = gradients
        for key in (*path, "adapter", "W"):
            found = found.get(key) if isinstance(found, dict) else None
        expected = shape_of(layer.base)
        if found is None or jnp.shape(found) != expected:
            has = "none" if found is None else f"one of shape {jnp.shape(found)}"
            raise ValueError(
                f"start_from_gradients: the weight of {joined(path)!r} has the shape {expected}; "
                f"expected a gradient of that shape, but there is {has}."
            )
        layer.adapter.from_gradient(jnp.asarray(found), rate)
