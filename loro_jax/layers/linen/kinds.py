"""Flax's layers that multiply by a kernel: the layout of each, and the two layers of a pair.

Both halves of a pair are layers of Flax, so that dtypes, precision, strides and padding are what
Flax makes of the fields of the layer that they stand for.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from loro_jax.layers.common import named
from loro_jax.layers.kernels import (
    Layout,
    convolution_layout,
    dense_layout,
    general_layout,
    split_equation,
)

Array = jax.Array
Halves = tuple[nn.Module, nn.Module]

_ZEROS = nn.initializers.zeros_init()


@dataclasses.dataclass(frozen=True)
class Kind:
    """A class of layers.

    Attributes:
        layer: the class.
        layout: layout of the kernel, from a layer, its input, and the equation of the call.
        halves: the two layers of a pair, from a layer, the rank, the layout and the equation.
    """

    layer: type[nn.Module]
    layout: Callable[[Any, Array, str], Layout]
    halves: Callable[[Any, int, Layout, str], Halves]

    def is_called(self, context: nn.module.InterceptorContext) -> bool:
        """Returns whether an intercepted call is that of the class, not of one derived from it."""
        called = getattr(context.orig_method, "func", None)
        return isinstance(context.module, self.layer) and called is inspect.unwrap(
            self.layer.__call__
        )


def _remade(layer: type[nn.Module], module: Any, **changes: Any) -> Any:
    """Returns a layer with the fields of another, which belongs to no module."""
    fields = {
        field.name: getattr(module, field.name)
        for field in dataclasses.fields(layer)
        if field.name not in ("parent", "name") and hasattr(module, field.name)
    }
    # Some initialisers fit only one shape, such as those that return the weights of a checkpoint.
    fields |= {"kernel_init": _ZEROS, "bias_init": _ZEROS, "parent": None}
    return layer(**{**fields, **changes})


def _dense(module: Any, x: Array, equation: str) -> Layout:
    return dense_layout((x.shape[-1], module.features))


def _dense_halves(module: Any, rank: int, layout: Layout, equation: str) -> Halves:
    first = _remade(nn.Dense, module, features=rank, use_bias=False)
    return first, _remade(nn.Dense, module)


def _as_tuple(value: Any) -> tuple[int, ...]:
    return (value,) if hasattr(value, "__index__") else tuple(value)


def _general(module: Any, x: Array, equation: str) -> Layout:
    # Flax orders the axes.
    batch, axes = (
        sorted(axis % x.ndim for axis in _as_tuple(given))
        for given in (module.batch_dims, module.axis)
    )
    sizes = [x.shape[axis] for axis in (*batch, *axes)]
    return general_layout((*sizes, *_as_tuple(module.features)), len(batch), len(axes))


def _general_halves(module: Any, rank: int, layout: Layout, equation: str) -> Halves:
    first = _remade(nn.DenseGeneral, module, features=rank, use_bias=False)
    # The output of the first has the axes of the batch in front and that of the rank at the end.
    return first, _remade(nn.DenseGeneral, module, axis=-1)


def _einsum(module: Any, x: Array, equation: str) -> Layout:
    return Layout(tuple(module.shape), split_equation(equation).roles)


def _einsum_halves(module: Any, rank: int, layout: Layout, equation: str) -> Halves:
    parts = split_equation(equation)
    batch, inputs, outputs = (layout.sizes(role) for role in "bio")
    first = _remade(
        nn.Einsum,
        module,
        shape=(*batch, *inputs, rank),
        einsum_str=parts.down,
        use_bias=False,
    )
    return first, _remade(nn.Einsum, module, shape=(*batch, rank, *outputs), einsum_str=parts.up)


def _convolution(module: Any, x: Array, equation: str) -> Layout:
    if module.feature_group_count != 1 or module.mask is not None:
        raise ValueError("a convolution with groups or a mask does not multiply by one matrix")
    return convolution_layout((*_as_tuple(module.kernel_size), x.shape[-1], module.features))


def _convolution_halves(module: Any, rank: int, layout: Layout, equation: str) -> Halves:
    first = _remade(nn.Conv, module, features=rank, use_bias=False)
    fields = ("features", "use_bias", "dtype", "param_dtype", "precision", "promote_dtype")
    # At each position, the outputs are those of a dense layer.
    return first, nn.Dense(**{name: getattr(module, name) for name in fields}, parent=None)


DENSE = Kind(nn.Dense, _dense, _dense_halves)
GENERAL = Kind(nn.DenseGeneral, _general, _general_halves)
EINSUM = Kind(nn.Einsum, _einsum, _einsum_halves)
CONVOLUTION = Kind(nn.Conv, _convolution, _convolution_halves)
KINDS = (DENSE, GENERAL, EINSUM, CONVOLUTION)

# Modules that compute with another kernel than the one in the parameters.
NORMALISING = (nn.WeightNorm, nn.SpectralNorm)


def input_and_equation(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[Array, str]:
    """Returns the input of a layer's call, and the equation if it is an einsum."""
    x = args[0] if args else kwargs["inputs"]
    given = args[1] if len(args) > 1 else kwargs.get("einsum_str")
    return x, given or getattr(module, "einsum_str", None) or ""


def through_rank(
    kind: Kind,
    module: Any,
    factors: tuple[Array, Array],
    bias: Array | None,
    x: Array,
    equation: str = "",
) -> Array:
    """Returns the output of a layer whose kernel is a pair; the kernel is never formed.

    Args:
        kind: class of the layer.
        module: the layer.
        factors: B (batch, m, r) and A (batch, r, n).
        bias: its bias, or None.
        x: its input.
        equation: the equation of the call of an einsum.

    Raises:
        ValueError: if the pair does not fit the layer.
    """
    layout = kind.layout(module, x, equation)
    B, A = map(jnp.asarray, factors)
    m, n = layout.matrix_shape
    if (B.shape[-2], A.shape[-1]) != (m, n) or math.prod(B.shape[:-2]) != math.prod(
        layout.sizes("b")
    ):
        raise ValueError(
            f"the layer maps {n} inputs to {m} outputs, but its pair has B of shape {B.shape} and "
            f"A of shape {A.shape}"
        )
    first, second = kind.halves(module, A.shape[-2], layout, equation)
    latent: Any = first.apply({"params": {"kernel": layout.down(A)}}, x)
    given = {"kernel": layout.up(B)} | ({} if bias is None else {"bias": bias})
    y: Any = second.apply({"params": given}, named(latent))
    return y
