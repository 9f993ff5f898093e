"""Modules of an NNX network by their places: found, and replaced."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from flax import nnx

# Attributes and indices from the network to a module, such as ("blocks", 0, "query").
Path = tuple[Any, ...]


def modules(model: nnx.Module) -> Iterator[tuple[Path, nnx.Module]]:
    """Yields all modules with their paths; a shared one only once."""
    for path, node in nnx.iter_graph(model):
        if isinstance(node, nnx.Module):
            yield path, node


def put_everywhere(model: Any, path: Path, duplicates: list[list[Path]], layer: nnx.Module) -> Any:
    """Replaces the module at a path, and wherever else the network has the same module."""
    same = next((group for group in duplicates if path in group), [path])
    for place in same:
        model = _put(model, place, layer)
    return model


def _put(node: Any, path: Path, layer: nnx.Module) -> Any:
    """Replaces what is at a path; returns the node, or a new one in place of a tuple or a leaf."""
    if not path:
        return layer
    key, *rest = path
    indexed = isinstance(node, tuple | list | dict | nnx.List)
    child = node[key] if indexed else getattr(node, key)
    replaced = _put(child, tuple(rest), layer)
    if replaced is child:
        return node
    if isinstance(node, tuple):
        items = [*node[:key], replaced, *node[key + 1 :]]
        return type(node)(*items) if hasattr(node, "_fields") else tuple(items)
    if indexed:
        node[key] = replaced
    else:
        setattr(node, key, replaced)
    return node
