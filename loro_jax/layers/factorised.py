"""Any Flax NNX layer with one kernel, split at a rank: two layers of its own class in sequence.

``y = layer(x)`` becomes ``y = up(down(x))``, where ``down`` is the same layer with r outputs and a
kernel made of A, and ``up`` is the same layer (after a convolution: a dense one) with r inputs, a
kernel made of B, and the bias. Both are Flax's own: dtypes, precision, padding and the like mean
what they meant before.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from loro_jax.layers.common import Original, TakesPlace
from loro_jax.layers.dense import Dense
from loro_jax.layers.kernels import (
    Layout,
    convolution_layout,
    dense_layout,
    general_layout,
    product,
    split_equation,
)
from loro_jax.layers.sharding import latent_sharding

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Split:
    """How a layer splits in two.

    Attributes:
        kernel: name of the kernel's attribute.
        layout: which axes of the kernel are inputs and outputs.
        down: makes the first layer, without a kernel, for a rank.
        up: makes the second layer, without a kernel, for a rank.
        contracted: axes of the input that the latents do not have; None: it takes no shardings.
    """

    kernel: str
    layout: Layout
    down: Callable[[int], nnx.GraphDef]
    up: Callable[[int], nnx.GraphDef]
    contracted: tuple[int, ...] | None = (-1,)


class FactorisedLayer(TakesPlace):
    """A layer whose kernel is a pair: ``y = up(down(x))`` with B (out, r) and A (r, in).

    Made by :func:`loro_jax.layers.factorise`. B and A have leading axes if the kernel has axes of a
    batch.

    Args:
        B: output-side factor.
        A: input-side factor.
        bias: bias; None: none.
        split: how the dense layer splits.
        original: the dense layer without its arrays.
    """

    def __init__(
        self,
        B: nnx.Variable,
        A: nnx.Variable,
        bias: nnx.Variable | None,
        split: Split,
        original: Original,
    ):
        self.B, self.A = B, A
        self.bias = nnx.data(bias)
        rank = B.shape[-1]
        self.kernel_name, self.layout = split.kernel, split.layout
        self.contracted = split.contracted
        self.first, self.second = split.down(rank), split.up(rank)
        self.original = original

    @property
    def rank(self) -> int:
        """Inner dimension r."""
        return self.B.shape[-1]

    def __call__(self, x: Array, **options: Any) -> Array:
        """Maps the inputs as the dense layer does; ``out_sharding`` is that of the output."""
        down = nnx.merge(self.first, {self.kernel_name: self.layout.down(self.A[...])})
        sharding = None if self.contracted is None else latent_sharding(x, self.contracted)
        latent = down(x) if sharding is None else down(x, out_sharding=sharding)
        rest = {} if self.bias is None else {"bias": self.bias[...]}
        up = nnx.merge(self.second, {self.kernel_name: self.layout.up(self.B[...]), **rest})
        return up(latent, **options)

    def product(self) -> Array:
        """Returns B A, in float32 or wider."""
        return product(self.B[...], self.A[...])

    def merged(self) -> nnx.Module:
        """Returns the dense layer."""
        assert self.original is not None  # as given to the constructor
        kernel = self.layout.kernel(self.product()).astype(self.B.dtype)
        rest = {} if self.bias is None else {"bias": self.bias[...]}
        return nnx.merge(self.original.definition, {self.kernel_name: kernel, **rest})


def split_of(layer: nnx.Module) -> Split | None:
    """Returns how a layer splits; None if it is of no known kind.

    Known are :class:`~loro_jax.layers.dense.Dense`, ``nnx.Linear``, ``nnx.LinearGeneral``,
    ``nnx.Einsum``, ``nnx.Conv``, and modules of other packages that apply an equation, their
    attribute ``einsum_str``, to their input and their only parameter. Subclasses with a
    ``__call__`` of their own may compute anything, so that they are not known.

    Raises:
        ValueError: if its kernel is no matrix; the message is a reason.
    """
    for kind, split in _SPLITS.items():
        if isinstance(layer, kind):
            return split(layer) if type(layer).__call__ is kind.__call__ else None
    if isinstance(getattr(layer, "einsum_str", None), str) and len(_parameters(layer)) == 1:
        return _split_einsum(layer)
    return None


def without_arrays(layer: nnx.Module, **changes: Any) -> nnx.GraphDef:
    """Returns a layer's definition without its arrays, with some attributes changed."""
    changed = nnx.clone(layer)
    for name, value in changes.items():
        setattr(changed, name, nnx.data(None) if value is None else value)
    return nnx.split(changed)[0]


def _parameters(layer: nnx.Module) -> dict[str, nnx.Variable]:
    """Returns the variables of a module, but for its bias."""
    found = {name: value for name, value in vars(layer).items() if isinstance(value, nnx.Variable)}
    return {name: value for name, value in found.items() if name != "bias"}


def _without_bias(layer: nnx.Module) -> dict[str, Any]:
    """Returns the changes that take a layer's bias away."""
    changes: dict[str, Any] = {"bias": None} if getattr(layer, "bias", None) is not None else {}
    return {**changes, "use_bias": False} if hasattr(layer, "use_bias") else changes


def _split_linear(layer: nnx.Linear) -> Split:
    return Split(
        "kernel",
        dense_layout((layer.in_features, layer.out_features)),
        lambda r: without_arrays(layer, out_features=r, **_without_bias(layer)),
        lambda r: without_arrays(layer, in_features=r),
    )


def _split_projection(layer: Dense) -> Split:
    def half(rank: int) -> nnx.GraphDef:
        raise TypeError("a Dense projection is replaced by a LowRankLinear as a whole")

    return Split("W", Layout(tuple(layer.W.shape[-2:]), "oi"), half, half)


def _split_general(layer: nnx.LinearGeneral) -> Split:
    batch = tuple(layer.batch_axis.values())
    shape = (*batch, *layer.in_features, *layer.out_features)
    return Split(
        "kernel",
        general_layout(shape, len(batch), len(layer.in_features)),
        lambda r: without_arrays(layer, out_features=(r,), **_without_bias(layer)),
        # The first layer's outputs are the last axis; its axes of a batch come first.
        lambda r: without_arrays(layer, in_features=(r,), axis=(-1,)),
        tuple(layer.axis),
    )


def _split_einsum(layer: Any) -> Split:
    if layer.einsum_str is None:
        raise ValueError("its equation is given only when it is called")
    ((kernel, variable),) = _parameters(layer).items()
    equations = split_equation(layer.einsum_str)
    shape = variable.shape[variable.ndim - len(equations.roles) :]
    if len(shape) != len(equations.roles):
        raise ValueError(f"its kernel {variable.shape} does not fit {layer.einsum_str!r}")
    layout = Layout(tuple(shape), equations.roles)

    def changes(equation: str, shape: tuple[int, ...]) -> dict[str, Any]:
        # nnx.Einsum needs the shape to place its bias.
        known = {"kernel_shape": shape} if hasattr(layer, "kernel_shape") else {}
        return {"einsum_str": equation, **known}

    batch, outputs = layout.sizes("b"), layout.sizes("o")
    return Split(
        kernel,
        layout,
        lambda r: without_arrays(layer, **changes(equations.down, ()), **_without_bias(layer)),
        lambda r: without_arrays(layer, **changes(equations.up, (*batch, r, *outputs))),
        equations.contracted if isinstance(layer, nnx.Einsum) else None,
    )


def _split_convolution(layer: nnx.Conv) -> Split:
    if layer.feature_group_count != 1:
        raise ValueError(f"it has {layer.feature_group_count} groups; expected 1")
    if layer.mask is not None:
        raise ValueError("its kernel is masked")
    window = layer.kernel_size

    def down(r: int) -> nnx.GraphDef:
        shape = (*window, layer.in_features, r)
        changes = {"out_features": r, "kernel_shape": shape}
        return without_arrays(layer, **changes, **_without_bias(layer))

    def up(r: int) -> nnx.GraphDef:
        options = {name: getattr(layer, name) for name in _SHARED_WITH_DENSE}
        dense = nnx.eval_shape(
            lambda: nnx.Linear(r, layer.out_features, **options, rngs=nnx.Rngs(0))
        )
        return nnx.split(dense)[0]

    shape = (*window, layer.in_features, layer.out_features)
    return Split("kernel", convolution_layout(shape), down, up)


# Options that a convolution and the dense layer after it have in common.
_SHARED_WITH_DENSE = (
    "use_bias",
    "dtype",
    "param_dtype",
    "precision",
    "promote_dtype",
    "preferred_element_type",
)


def _split_transposed(layer: nnx.ConvTranspose) -> Split:
    raise ValueError("transposed convolutions are not supported")


_SPLITS: dict[type[nnx.Module], Callable[[Any], Split]] = {
    Dense: _split_projection,
    nnx.Linear: _split_linear,
    nnx.LinearGeneral: _split_general,
    nnx.Einsum: _split_einsum,
    nnx.Conv: _split_convolution,
    nnx.ConvTranspose: _split_transposed,
}
