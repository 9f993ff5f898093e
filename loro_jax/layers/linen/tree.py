"""The layers of a tree of Linen's parameters, and the boxes that hold the names of axes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flax.core import meta

from loro_jax.layers.kernels import BATCH, INPUT, OUTPUT, Layout, pair_axes

KERNEL = "kernel"
Names = tuple[Any, ...]


def layers_of(params: Any) -> dict[str, Mapping[str, Any]]:
    """Returns the layers that have a kernel or a pair, by path, in the order of the tree."""
    found: dict[str, Mapping[str, Any]] = {}

    def visit(node: Any, path: tuple[str, ...]) -> None:
        if not isinstance(node, Mapping):
            return
        if has_kernel(node) or has_pair(node):
            found["/".join(path)] = node
        for name, child in node.items():
            visit(child, (*path, str(name)))

    visit(params, ())
    return found


def replace_layers(params: Any, new: Mapping[str, Mapping[str, Any]]) -> Any:
    """Returns the tree with other entries for some layers, whose modules inside are kept."""

    def visit(node: Any, path: tuple[str, ...]) -> Any:
        if not isinstance(node, Mapping):
            return node
        node_new = new.get("/".join(path), node)
        entries = {name: visit(child, (*path, str(name))) for name, child in node_new.items()}
        return type(node)(entries)  # type: ignore[call-arg]

    return visit(params, ())


def has_kernel(layer: Mapping[str, Any]) -> bool:
    """Returns whether a layer has a kernel, and no entry in the place of a pair."""
    return _is_array(layer.get(KERNEL)) and not {"B", "A"} & set(layer)


def has_pair(layer: Mapping[str, Any]) -> bool:
    """Returns whether a layer has a pair in place of a kernel."""
    return _is_array(layer.get("B")) and _is_array(layer.get("A")) and KERNEL not in layer


def _is_array(leaf: Any) -> bool:
    return hasattr(value_of(leaf), "shape")


def value_of(leaf: Any) -> Any:
    """Returns the array of a parameter, which may be boxed with metadata."""
    if isinstance(leaf, meta.Partitioned):
        return leaf.unbox(apply_constraint=False)
    return leaf.unbox() if isinstance(leaf, meta.AxisMetadata) else leaf


def boxed_pair(kernel: Any, layout: Layout, B: Any, A: Any) -> tuple[Any, Any]:
    """Returns B and A in boxes like that of the kernel, with the names of their axes."""
    names = _names(kernel)
    of_B, of_A = (None, None) if names is None else pair_axes(layout, names)
    return _boxed(kernel, B, of_B), _boxed(kernel, A, of_A)


def boxed_kernel(B: Any, A: Any, layout: Layout, kernel: Any) -> Any:
    """Returns the kernel in a box like those of B and A, with the names of its axes.

    Where several axes had become one, the first has its name, and the others have none.
    """
    of_B, of_A = _names(B), _names(A)
    if of_B is None or of_A is None:
        return _boxed(B, kernel, None)
    stack = len(of_B) - 2 - layout.roles.count(BATCH)
    batch, output, entry = iter(of_B[stack:-2]), iter(of_B[-2:-1]), iter(of_A[-1:])
    by_role = {BATCH: batch, OUTPUT: output, INPUT: entry}
    own = tuple(next(by_role[role], None) for role in layout.roles)
    return _boxed(B, kernel, (*of_B[:stack], *own))


def _names(leaf: Any) -> Names | None:
    """Returns the names of all axes of a boxed parameter; None: it has none."""
    names = getattr(leaf, "names", None) if isinstance(leaf, meta.AxisMetadata) else None
    if names is None:
        return None
    return (*names, *[None] * (len(value_of(leaf).shape) - len(names)))


def _boxed(like: Any, value: Any, names: Names | None) -> Any:
    if not isinstance(like, meta.AxisMetadata):
        return value
    box: Any = like.replace_boxed(value)
    return box if names is None else box.replace(names=names)
