"""Which parameters of a network are trained: they become fixed, and parameters again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flax import nnx

from loro_jax.layers.common import Fixed
from loro_jax.layers.places import Path


class Frozen(Fixed):
    """A parameter of a network that is not trained for now."""


def freeze(model: nnx.Module, keep: Callable[[Path], bool]) -> None:
    """Makes parameters of a network fixed, in place: they have no gradient and no state.

    Args:
        model: the network.
        keep: path of a parameter -> whether it stays trained. One that is shared stays so if it is
            kept at any of its places.

    Example:
        >>> model = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
        >>> freeze(model, lambda path: path == ("bias",))
        >>> list(nnx.state(model, nnx.Param)), list(nnx.state(model, Fixed))
        (['bias'], ['kernel'])
    """
    _change(model, nnx.Param, Frozen, lambda path: not keep(path))


def unfreeze(model: nnx.Module) -> None:
    """Makes all variables that :func:`freeze` has fixed parameters again, in place."""
    _change(model, Frozen, nnx.Param, lambda path: True)


def _change(
    model: nnx.Module, old: type, new: type[nnx.Variable], chosen: Callable[[Path], bool]
) -> None:
    places: dict[int, list[Path]] = {}
    found: dict[int, Any] = {}
    for path, variable in _variables(model, ()):
        if isinstance(variable, old):
            places.setdefault(id(variable), []).append(path)
            found[id(variable)] = variable
    for number, variable in found.items():
        if all(map(chosen, places[number])):
            made = _as(new, variable)
            for path in places[number]:
                _put(model, path, made)


def _variables(node: Any, path: Path, seen: frozenset[int] = frozenset()) -> Any:
    """Yields the variables of a network with all their paths, shared ones several times."""
    if isinstance(node, nnx.Variable):
        yield path, node
        return
    if id(node) in seen:
        return  # a module that contains itself
    seen |= {id(node)}
    for key, child in _children(node):
        yield from _variables(child, (*path, key), seen)


def _children(node: Any) -> list[tuple[Any, Any]]:
    if isinstance(node, list | tuple | nnx.List):
        return list(enumerate(node))
    if isinstance(node, dict):
        return list(node.items())
    if isinstance(node, nnx.Module):
        return [item for item in vars(node).items() if not item[0].startswith("_")]
    return []


def _as(kind: type[nnx.Variable], variable: nnx.Variable) -> nnx.Variable:
    """Returns a variable of another type, with the same value and metadata."""
    metadata = dict(variable.get_metadata())
    metadata.pop("eager_sharding", None)
    # Its array is in its place already.
    return kind(variable.get_value(), eager_sharding=False, **metadata)


def _put(node: Any, path: Path, variable: nnx.Variable) -> None:
    *parents, last = path
    for key in parents:
        node = node[key] if isinstance(node, list | tuple | dict | nnx.List) else getattr(node, key)
    if isinstance(node, nnx.Module) and not isinstance(node, nnx.List):
        setattr(node, last, variable)
    else:
        node[last] = variable
