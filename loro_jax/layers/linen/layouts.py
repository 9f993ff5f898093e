"""The roles of a kernel's axes, found by tracing a network abstractly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from loro_jax.layers.kernels import Layout
from loro_jax.layers.linen.kinds import DENSE, GENERAL, KINDS, NORMALISING, Kind, input_and_equation
from loro_jax.layers.linen.modules import LowRankDense, LowRankDenseGeneral
from loro_jax.layers.linen.tree import KERNEL, layers_of, value_of
from loro_jax.layers.selection import joined

# Low-rank modules have the layouts of the layers whose place they take.
_OF_PAIRS = (
    Kind(LowRankDense, DENSE.layout, DENSE.halves),
    Kind(LowRankDenseGeneral, GENERAL.layout, GENERAL.halves),
)


def kernel_layouts(model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Layout]:
    """Finds which axes of each kernel of a network are inputs, outputs, or a batch.

    The network is initialised abstractly: nothing is computed, and arguments may be
    ``jax.ShapeDtypeStruct``.

    Args:
        model: a Linen module.
        *args: arguments of ``model.init`` after the random key.
        **kwargs: named ones, such as ``train=False`` or ``method=...``.

    Returns:
        The layouts by the layers' paths, of all ``nn.Dense``, ``nn.DenseGeneral``, ``nn.Einsum``
        and ``nn.Conv`` without groups or a mask, also inside other modules, such as
        ``nn.MultiHeadDotProductAttention``; and of low-rank modules.

    Example:
        >>> import flax.linen as nn, jax.numpy as jnp
        >>> model = nn.Sequential([nn.Conv(8, (3, 3)), nn.Dense(4)])
        >>> layouts = kernel_layouts(model, jnp.ones((1, 5, 5, 2)))
        >>> {path: (layout.shape, layout.roles) for path, layout in layouts.items()}
        {'layers_0': ((3, 3, 2, 8), 'iiio'), 'layers_1': ((8, 4), 'io')}
    """
    found: dict[str, Layout | None] = {}
    within: list[nn.Module] = []  # modules being called whose parts are no layers with a matrix

    def note(
        next_fun: Callable[..., Any],
        given: tuple[Any, ...],
        named: dict[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        module = context.module
        kind = next((kind for kind in (*KINDS, *_OF_PAIRS) if kind.is_called(context)), None)
        if kind is not None and not within:
            path = joined(module.path)
            layout = _layout(kind, module, given, named)
            # A layer that is called in two ways has no layout.
            found[path] = layout if found.get(path, layout) == layout else None
        # The halves of a low-rank module are no layers of the network.
        if kind not in _OF_PAIRS and not isinstance(module, NORMALISING):
            return next_fun(*given, **named)
        within.append(module)
        try:
            return next_fun(*given, **named)
        finally:
            within.pop()

    leaves, structure = jax.tree.flatten((args, kwargs))
    arrays = {i: leaf for i, leaf in enumerate(leaves) if hasattr(leaf, "dtype")}

    def initialise(arrays: dict[int, Any]) -> Any:
        whole = [arrays.get(i, leaf) for i, leaf in enumerate(leaves)]
        args, kwargs = jax.tree.unflatten(structure, whole)
        return model.init(jax.random.key(0), *args, **kwargs)

    with nn.intercept_methods(note):
        variables = jax.eval_shape(initialise, arrays)
    layers = layers_of(variables.get("params", {}))
    # Layers that a module calls with parameters from elsewhere are none of the network's.
    return {
        path: layout
        for path, layout in found.items()
        if layout is not None and path in layers and _fits(layers[path], layout)
    }


def _layout(
    kind: Kind, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Layout | None:
    """Returns the layout of a called layer; None: its kernel is no matrix."""
    try:
        return kind.layout(module, *input_and_equation(module, args, kwargs))
    except ValueError:
        return None


def _fits(layer: Any, layout: Layout) -> bool:
    """Returns whether the sizes of a layer's kernel are those of the layout, in whatever order."""
    if KERNEL not in layer:
        return True
    shape = list(value_of(layer[KERNEL]).shape)
    return all(shape.count(size) >= layout.shape.count(size) for size in layout.shape)
