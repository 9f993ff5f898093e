"""Kernels of any layout as matrices, and back: dense, general, einsum and convolution kernels.

A layer that multiplies by a kernel is linear in some axes of its input. Ordered as outputs x
inputs, the kernel is a matrix W (m, n), and a pair W = B A splits the layer into two of the same
class: the first maps the inputs to r numbers by A, the second these to the outputs by B.

Some kernels have further axes: those of a batch, which inputs and outputs share, and, before all
others, those of a stack of layers that a scan or a vmap runs through. Both are leading axes of W, B
and A.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from loro_jax.linalg.precision import at_least_float32, matmul

Array = jax.Array

BATCH, INPUT, OUTPUT = "b", "i", "o"


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which axes of a kernel are inputs, outputs, or a batch.

    Attributes:
        shape: shape of one layer's kernel, without the axes of a stack.
        roles: "b" (batch), "i" (input) or "o" (output) for each axis.

    Example:
        >>> layout = Layout((8, 4, 2), "ioo")  # queries of 4 heads of size 2
        >>> layout.matrix_shape
        (8, 8)
        >>> kernel = jnp.arange(64.0).reshape(8, 4, 2)
        >>> W = layout.matrix(kernel)
        >>> bool((W == kernel.reshape(8, 8).T).all()), bool((layout.kernel(W) == kernel).all())
        (True, True)
    """

    shape: tuple[int, ...]
    roles: str

    def sizes(self, role: str) -> tuple[int, ...]:
        """Returns the sizes of the axes with this role."""
        return tuple(n for n, r in zip(self.shape, self.roles, strict=True) if r == role)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Numbers of outputs and inputs, (m, n)."""
        return math.prod(self.sizes(OUTPUT)), math.prod(self.sizes(INPUT))

    @property
    def _order(self) -> list[int]:
        """Axes of the kernel in the order of W: batch, outputs, inputs."""
        return sorted(range(len(self.roles)), key=lambda axis: "boi".index(self.roles[axis]))

    def stack(self, kernel: Array) -> tuple[int, ...]:
        """Returns the sizes of the axes of a stack, which come first."""
        return kernel.shape[: kernel.ndim - len(self.shape)]

    def matrix(self, kernel: Array) -> Array:
        """Returns W, (stack, batch, m, n)."""
        stack = self.stack(kernel)
        order = [*range(len(stack)), *(len(stack) + axis for axis in self._order)]
        return kernel.transpose(order).reshape(*stack, *self.sizes(BATCH), *self.matrix_shape)

    def kernel(self, W: Array) -> Array:
        """Returns the kernel of a matrix W, (stack, batch, m, n)."""
        stack = W.shape[: W.ndim - 2 - len(self.sizes(BATCH))]
        ordered = W.reshape(*stack, *(self.shape[axis] for axis in self._order))
        places = [self._order.index(axis) for axis in range(len(self.shape))]
        return ordered.transpose([*range(len(stack)), *(len(stack) + axis for axis in places)])

    def down(self, A: Array) -> Array:
        """Returns the kernel of the first layer, (stack, batch, inputs, r), for A."""
        return A.mT.reshape(*A.shape[:-2], *self.sizes(INPUT), A.shape[-2])

    def up(self, B: Array) -> Array:
        """Returns the kernel of the second layer, (stack, batch, r, outputs), for B."""
        return B.mT.reshape(*B.shape[:-2], B.shape[-1], *self.sizes(OUTPUT))


@dataclasses.dataclass(frozen=True)
class Equations:
    """The einsum equation of a layer, split for the two layers of a pair.

    Attributes:
        roles: role of each of the kernel's axes, as in :class:`Layout`.
        down: equation of the first layer.
        up: equation of the second layer.
        contracted: axes of the input that the latents do not have.
    """

    roles: str
    down: str
    up: str
    contracted: tuple[int, ...]


def split_equation(equation: str) -> Equations:
    """Splits ``"input,kernel->output"`` at a rank.

    Args:
        equation: an explicit einsum equation of two operands, the second of which is the kernel.

    Returns:
        The roles of the kernel's axes and the equations of both layers.

    Raises:
        ValueError: if the kernel is no matrix in it: no axis of the input is contracted with it, no
            axis of the output comes from it, or an index occurs twice in one operand.

    Example:
        >>> split_equation("BTD,DNH->BTNH")
        Equations(roles='ioo', down='BTD,Da->BTa', up='BTa,aNH->BTNH', contracted=(2,))
    """
    operands, _, output = equation.replace(" ", "").partition("->")
    given, _, kernel = operands.partition(",")
    shown = f"the equation {equation!r}"
    if not output or "," in kernel or "." in kernel:
        raise ValueError(f"{shown} is not of the form 'input,kernel->output'")
    for operand in (given, kernel, output):
        if len(set(operand) - {"."}) != len(operand.replace(".", "")):
            raise ValueError(f"{shown} has an index twice in {operand!r}")
    roles = "".join(_role(index, given, output) for index in kernel)
    if "?" in roles or INPUT not in roles or OUTPUT not in roles:
        raise ValueError(f"{shown} does not multiply by a matrix")
    rank = next(index for index in "abcdefghijklmnopqrstuvwxyz" if index not in equation)
    by_role = {
        role: "".join(index for index, r in zip(kernel, roles, strict=True) if r == role)
        for role in (BATCH, INPUT, OUTPUT)
    }
    kept = "".join(index for index in given if index in output or index == ".")
    down = f"{given},{by_role[BATCH]}{by_role[INPUT]}{rank}->{kept}{rank}"
    up = f"{kept}{rank},{by_role[BATCH]}{rank}{by_role[OUTPUT]}->{output}"
    # After "...", axes are counted from the end.
    start, dots, end = given.partition("...")
    places = [(index, axis) for axis, index in enumerate(start)]
    places += [(index, axis - len(end)) for axis, index in enumerate(end)] if dots else []
    contracted = tuple(axis for index, axis in places if index not in output)
    return Equations(roles, down, up, contracted)


def _role(index: str, given: str, output: str) -> str:
    roles = {(True, True): BATCH, (True, False): INPUT, (False, True): OUTPUT}
    return roles.get((index in given, index in output), "?")


def pair_axes(layout: Layout, names: tuple) -> tuple[tuple, tuple]:
    """Returns the names of B's and A's axes, for sharding, from those of a kernel's axes.

    Several axes that become one keep the name of the first: devices then hold the same rows as
    before. The axis of the rank has none.

    Args:
        layout: layout of the kernel.
        names: a name, a tuple of names, or None for each axis of the kernel, stacks included.

    Example:
        >>> pair_axes(Layout((8, 4, 2), "ioo"), ("embed", "heads", None))
        (('heads', None), (None, 'embed'))
    """
    stack = names[: len(names) - len(layout.shape)]
    own = names[len(stack) :]
    by_role = {
        role: [name for name, r in zip(own, layout.roles, strict=True) if r == role]
        for role in (BATCH, INPUT, OUTPUT)
    }
    leading = (*stack, *by_role[BATCH])
    return (*leading, by_role[OUTPUT][0], None), (*leading, None, by_role[INPUT][0])


def dense_layout(shape: tuple[int, int]) -> Layout:
    """Returns the layout of a kernel (in, out), Flax's."""
    return Layout(tuple(shape), INPUT + OUTPUT)


def general_layout(shape: tuple[int, ...], batch: int, inputs: int) -> Layout:
    """Returns the layout of a kernel (batch axes, input axes, output axes)."""
    outputs = len(shape) - batch - inputs
    return Layout(tuple(shape), BATCH * batch + INPUT * inputs + OUTPUT * outputs)


def convolution_layout(shape: tuple[int, ...]) -> Layout:
    """Returns the layout of a convolution's kernel (window, in, out), Flax's."""
    return Layout(tuple(shape), INPUT * (len(shape) - 1) + OUTPUT)


def product(B: Array, A: Array) -> Array:
    """Returns B A, in float32 or wider.

    For merging and export: accelerators would round the inputs of the product otherwise.
    """
    dtype = at_least_float32(B.dtype)
    return matmul(B.astype(dtype), A.astype(dtype))


def as_array(kernel: Array) -> Array:
    """Returns the kernel as a JAX array, unless it is only a shape and a dtype."""
    return kernel if isinstance(kernel, jax.ShapeDtypeStruct) else jnp.asarray(kernel)
