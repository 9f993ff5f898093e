"""Finding the low-rank pairs in any parameter tree.

A pair is a :class:`loro_jax.LowRank` node, or two sibling leaves named ``B`` and ``A`` under one
parent: entries of a dict, attributes of a dataclass, variables of an ``nnx.State``, boxed Linen
parameters. All of these show in a leaf's path, so one rule finds them all: strip the box's own
entry (``value``), and take the leaves whose paths agree but for a last entry of ``B`` or ``A``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from loro_jax.lowrank import LowRank, check_factors

PairsSpec = Any | Callable[[Any], Any]

# The attribute under which nnx variables and Linen boxes hold their array.
_BOX_ENTRY = "value"


class Pair(NamedTuple):
    """Where the two factors of a pair stand among ``jax.tree.leaves`` of the parameters."""

    name: str
    B: int
    A: int


def find_pairs(params: Any, spec: PairsSpec | None = None) -> list[Pair]:
    """Finds the low-rank pairs of a parameter tree.

    Args:
        params: any pytree of arrays (or of anything with a ``shape``).
        spec: None to find the pairs by themselves. Otherwise a tree of the structure of
            ``params`` (or a callable that makes one from ``params``) whose leaves are None for a
            regular parameter and ``"NAME.B"`` or ``"NAME.A"`` for the factors of the pair NAME.

    Returns:
        The pairs, in the order of their first leaf.

    Raises:
        ValueError: if two leaves look like a pair but do not multiply, or the spec does not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"mlp": {"B": jnp.ones((4, 2)), "A": jnp.ones((2, 3))}, "bias": jnp.ones(4)}
        >>> [pair.name for pair in find_pairs(params)]
        ['mlp']
        >>> params = {"up": jnp.ones((4, 2)), "down": jnp.ones((2, 3))}
        >>> [p.name for p in find_pairs(params, {"up": "adapter.B", "down": "adapter.A"})]
        ['adapter']
    """
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    by_name = _named_by_path(leaves) if spec is None else _named_by_spec(params, leaves, spec)
    pairs = []
    for name, sides in by_name.items():
        if set(sides) != {"B", "A"}:
            if spec is None:
                continue  # a lone leaf that happens to be called B or A is a regular parameter
            raise ValueError(
                f"pairs: the spec names {name}.{'/'.join(sides)} without its other side."
            )
        pair = Pair(name, sides["B"], sides["A"])
        B, A = leaves[pair.B][1], leaves[pair.A][1]
        # During optax's tree utilities leaves may be placeholders without a shape.
        if hasattr(B, "shape") and hasattr(A, "shape"):
            check_factors(B, A, f"the pair {name!r} (name it in pairs=..., or leave it out there)")
        pairs.append(pair)
    return sorted(pairs, key=lambda pair: min(pair.B, pair.A))


def describe_leaves(params: Any, limit: int = 12) -> str:
    """Paths and shapes of a tree's leaves, for error messages."""
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    lines = [
        f"{jax.tree_util.keystr(path)}: {tuple(getattr(leaf, 'shape', ()))}"
        for path, leaf in leaves[:limit]
    ]
    if len(leaves) > limit:
        lines.append(f"and {len(leaves) - limit} more")
    return "; ".join(lines) or "no leaf at all"


def _named_by_path(leaves: list[tuple[Any, Any]]) -> dict[str, dict[str, int]]:
    by_parent: dict[str, dict[str, int]] = {}
    for index, (path, _) in enumerate(leaves):
        entries = [_entry_name(entry) for entry in path]
        while entries and entries[-1] == _BOX_ENTRY:
            entries.pop()
        if entries and entries[-1] in ("B", "A"):
            parent = "/".join(entries[:-1])
            by_parent.setdefault(parent, {})[entries[-1]] = index
    return by_parent


def _named_by_spec(
    params: Any, leaves: list[tuple[Any, Any]], spec: PairsSpec
) -> dict[str, dict[str, int]]:
    tree = spec(params) if callable(spec) and not isinstance(spec, LowRank) else spec
    labels, structure = jax.tree.flatten(tree, is_leaf=lambda leaf: leaf is None)
    expected: Any = jax.tree.structure(params)
    if expected != structure:
        raise ValueError(
            "pairs: the spec must have the structure of the parameters, with None for a regular "
            f"leaf; the spec is {structure}, the parameters are {expected}."
        )
    by_name: dict[str, dict[str, int]] = {}
    for index, label in enumerate(labels):
        if label is None:
            continue
        name, _, side = str(label).rpartition(".")
        if not name or side not in ("B", "A"):
            path = jax.tree_util.keystr(leaves[index][0])
            raise ValueError(
                f"pairs: expected None, 'NAME.B' or 'NAME.A' at {path}, found {label!r}."
            )
        if side in by_name.setdefault(name, {}):
            raise ValueError(f"pairs: the spec names {name}.{side} twice.")
        by_name[name][side] = index
    return by_name


def _entry_name(entry: Any) -> str:
    """The bare name of a path entry, whatever kind of container it comes from."""
    for attribute in ("key", "name", "idx"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    return str(entry)
