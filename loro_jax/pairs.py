"""Finding the low-rank pairs in any parameter tree.

A pair is a :class:`loro_jax.LowRank` node, or two sibling leaves named ``B`` and ``A`` under one
parent: entries of a dict, attributes of a dataclass, variables of an ``nnx.State``, boxed Linen
parameters. All of these show in a leaf's path, so one rule finds them all: pass over the entry by
which Flax's own boxes hold their array, and take the leaves whose paths agree but for a last entry
of ``B`` or ``A``.

Names alone can mislead, so two things that look like it are kept out: siblings that are both square
(the matrices of a state-space model, say: no rank is fixed by such a product), with a warning; and
a factor that is shared between modules, which a tree shows in one of them alone, with an error.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import optax

from loro_jax.lowrank import LowRank, check_factors, check_real

PairsSpec = Any | Callable[[Any], Any]

# A pair of whatever: arrays, flags, shardings. The first belongs to B, the second to A.
Both = tuple[Any, Any]

# Flax's boxes: nnx variables and Linen's parameters with metadata. Each holds its array in an
# attribute; the classes are known by name, because Flax need not be installed.
_BOXES = ("Variable", "VariableState", "AxisMetadata")

_Path = tuple[Any, ...]


class Pair(NamedTuple):
    """Where the two factors of a pair stand among ``jax.tree.leaves`` of the parameters."""

    name: str
    B: int
    A: int


def find_pairs(params: Any, spec: PairsSpec | None = None) -> list[Pair]:
    """Finds the low-rank pairs of a parameter tree.

    Args:
        params: any pytree of arrays (or of anything with a ``shape``).
        spec: None to find the pairs automatically. Otherwise a tree of the structure of
            ``params`` (or a callable that makes one from ``params``) whose leaves are None for a
            regular parameter and ``"NAME.B"`` or ``"NAME.A"`` for the factors of the pair NAME.

    Returns:
        The pairs, in the order of their first leaf.

    Raises:
        ValueError: if two leaves look like a pair but do not multiply or are not of a real
            floating-point dtype, if a lone factor fits one of a pair (it may be shared), or the
            spec does not fit.

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
    pairs = _found_by_path(params) if spec is None else _named_by_spec(params, leaves, spec)
    for pair in pairs:
        B, A = leaves[pair.B][1], leaves[pair.A][1]
        # During optax's tree utilities leaves may be placeholders without a shape.
        if hasattr(B, "shape") and hasattr(A, "shape"):
            where = f"the pair {pair.name!r} (name it in pairs=..., or leave it out there)"
            check_factors(B, A, where)
            check_real(B, A, where)
    return sorted(pairs, key=lambda pair: min(pair.B, pair.A))


@dataclasses.dataclass(frozen=True)
class Pairs:
    """The pairs of one tree of parameters: takes them out of trees like it and puts them back.

    Whole trees are those with all leaves of the parameters. Trees of factors have
    ``optax.MaskedNode`` where another leaf is (the first that :meth:`split` returns).

    Attributes:
        found: where the pairs stand among the leaves of a whole tree.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"w": {"B": jnp.ones((4, 2)), "A": jnp.ones((2, 3))}, "bias": jnp.ones(4)}
        >>> pairs = pairs_of(params)
        >>> factors, others = pairs.split(params)
        >>> [(B.shape, A.shape) for B, A in pairs.take(factors)]
        [((4, 2), (2, 3))]
        >>> doubled = pairs.map(lambda pair: (2 * pair[0], pair[1]), factors)
        >>> float(pairs.join(params, doubled, others)["w"]["B"][0, 0])
        2.0
    """

    found: tuple[Pair, ...] = ()

    def __len__(self) -> int:
        return len(self.found)

    def split(self, tree: Any) -> tuple[Any, Any]:
        """Returns a whole tree twice: with its factors alone, and with all other leaves alone."""
        leaves, structure = jax.tree.flatten(tree)
        hole = optax.MaskedNode()
        factors = [leaf if i in self._indices else hole for i, leaf in enumerate(leaves)]
        others = [hole if i in self._indices else leaf for i, leaf in enumerate(leaves)]
        return jax.tree.unflatten(structure, factors), jax.tree.unflatten(structure, others)

    def join(self, like: Any, factors: Any, others: Any) -> Any:
        """Returns the whole tree of what :meth:`split` would take apart, structured as ``like``."""
        leaves, structure = jax.tree.flatten(like)
        of_factors, of_others = iter(jax.tree.leaves(factors)), iter(jax.tree.leaves(others))
        return jax.tree.unflatten(
            structure,
            [next(of_factors if i in self._indices else of_others) for i in range(len(leaves))],
        )

    def take(self, factors: Any) -> list[Both]:
        """Returns what a tree of factors has for B and A of each pair."""
        leaves = jax.tree.leaves(factors)
        return [(leaves[b], leaves[a]) for b, a in self._places]

    def put(self, like: Any, values: Sequence[Both]) -> Any:
        """Returns a tree of factors, structured as ``like``, with these values for B and A."""
        leaves, structure = jax.tree.flatten(like)
        for (b, a), (of_B, of_A) in zip(self._places, values, strict=True):
            leaves[b], leaves[a] = of_B, of_A
        return jax.tree.unflatten(structure, leaves)

    def map(self, fn: Callable[..., Both], *trees: Any) -> Any:
        """Returns a tree of ``fn((B, A), ...)`` of each pair, given trees of factors.

        A leaf of no pair (a direction may step other leaves, too) is that of the last tree.
        """
        columns = [self.take(tree) for tree in trees]
        return self.put(trees[-1], [fn(*row) for row in zip(*columns, strict=True)])

    def choose(self, leaves: Sequence[Any]) -> tuple[list[Both], list[Any]]:
        """Returns, of the leaves of a whole tree, those of each pair and those of no pair."""
        rest = [leaf for i, leaf in enumerate(leaves) if i not in self._indices]
        return [(leaves[pair.B], leaves[pair.A]) for pair in self.found], rest

    @property
    def _indices(self) -> set[int]:
        return {index for pair in self.found for index in (pair.B, pair.A)}

    @property
    def _places(self) -> list[tuple[int, int]]:
        """Where the factors of each pair stand among the leaves of a tree of factors."""
        order = sorted(self._indices)
        return [(order.index(pair.B), order.index(pair.A)) for pair in self.found]


def pairs_of(params: Any, spec: PairsSpec | None = None) -> Pairs:
    """Finds the pairs that an optimizer steps.

    Args:
        params: the parameters.
        spec: as for :func:`find_pairs`, or ``"optional"``: found automatically, and there may be
            none.

    Returns:
        The pairs.

    Raises:
        ValueError: if there is none and the spec isn't "optional"; and as :func:`find_pairs`.
    """
    check_spec(spec)
    optional = isinstance(spec, str)
    found = find_pairs(params, None if optional else spec)
    # An empty tree stands for "no parameters here" in optax.tree.map_params and partitions.
    if not found and not optional and jax.tree.leaves(params):
        raise ValueError(
            "loro: no low-rank pair found. Looked for LowRank nodes and for sibling leaves named "
            f"'B' (..., m, r) and 'A' (..., r, n); the tree holds {describe_leaves(params)}. Name "
            'the pairs with pairs=..., or pass pairs="optional" if there may be none.'
        )
    return Pairs(tuple(found))


def check_spec(spec: PairsSpec | None) -> None:
    """Raises ValueError for a word other than "optional"."""
    if isinstance(spec, str) and spec != "optional":
        raise ValueError(f'loro: pairs must be None, "optional" or a spec, but is {spec!r}.')


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


def _found_by_path(params: Any) -> list[Pair]:
    """Leaves called B and A under one parent."""
    by_parent: dict[_Path, dict[str, int]] = {}
    held_back: set[_Path] = set()
    leaves: list[Any] = []
    for path, leaf in _unboxed(params):
        side = _entry_name(path[-1]) if path else ""
        if leaf is _NOTHING:
            held_back.add(path[:-1])
            continue
        if side in ("B", "A"):
            by_parent.setdefault(path[:-1], {})[side] = len(leaves)
        leaves.append(leaf)

    nodes = _paths_of_nodes(params)
    pairs, lone = [], {}
    for parent, sides in by_parent.items():
        name = "/".join(map(_entry_name, parent))
        if len(sides) == 1:
            if parent not in held_back:
                lone[name] = sides
        elif parent in nodes or not _both_square(leaves[sides["B"]], leaves[sides["A"]]):
            pairs.append(Pair(name, sides["B"], sides["A"]))
        else:
            warnings.warn(
                f"pairs: B and A under {name!r} are both square, of shape "
                f"{tuple(leaves[sides['B']].shape)}: they are taken for regular parameters, not "
                "for a low-rank pair. Say what they are with pairs=..., or make them a LowRank.",
                stacklevel=2,
            )
    for name, sides in lone.items():
        _check_unshared(name, sides, pairs, leaves)
    return pairs


def _both_square(B: Any, A: Any) -> bool:
    shape: tuple[int, ...] = getattr(B, "shape", ())
    return len(shape) >= 2 and shape[-2] == shape[-1] and shape == getattr(A, "shape", ())


def _check_unshared(name: str, sides: dict[str, int], pairs: list[Pair], leaves: list[Any]) -> None:
    """Raises ValueError if a lone B or A fits the other side of a pair.

    A tree shows a parameter that modules share in one of them alone. An exact step gives a factor
    another basis, in which whatever else multiplies with it does not fit any more.
    """
    ((side, index),) = sides.items()
    other = "A" if side == "B" else "B"
    for pair in pairs:
        B, A = (leaves[index if s == side else getattr(pair, s)] for s in ("B", "A"))
        try:
            check_factors(B, A, "")
        except (ValueError, AttributeError):  # they do not multiply, or are placeholders
            continue
        raise ValueError(
            f"pairs: {name!r} has {side} of shape {tuple(leaves[index].shape)} but no {other}, and "
            f"{other} of {pair.name!r} fits it. A factor that modules share can't take exact steps "
            "with one of them; name the pairs with pairs=..., and leave these out if it is shared."
        )


# Where there is a hole instead of a leaf: None, or what Optax puts for a leaf that it masks.
_NOTHING = object()


def _unboxed(params: Any) -> Iterator[tuple[_Path, Any]]:
    """Leaves with their paths, but for the entries of boxes; also holes."""
    nodes = jax.tree_util.tree_flatten_with_path(
        params, is_leaf=lambda node: _is_box(node) or not jax.tree.leaves(node)
    )[0]
    for path, node in nodes:
        inside = jax.tree_util.tree_flatten_with_path(node)[0]
        if not inside:
            yield path, _NOTHING
        elif len(inside) == 1 and len(inside[0][0]) <= 1:
            yield path, inside[0][1]
        else:  # a box of a whole tree
            yield from ((path + further, leaf) for further, leaf in inside)


def _is_box(node: Any) -> bool:
    return any(
        kind.__name__ in _BOXES and kind.__module__.partition(".")[0] == "flax"
        for kind in type(node).__mro__
    )


def _paths_of_nodes(params: Any) -> set[_Path]:
    """Where the LowRank nodes are."""
    found = jax.tree_util.tree_flatten_with_path(
        params, is_leaf=lambda node: isinstance(node, LowRank)
    )[0]
    return {path for path, node in found if isinstance(node, LowRank)}


def _named_by_spec(params: Any, leaves: list[tuple[Any, Any]], spec: PairsSpec) -> list[Pair]:
    labels = _labels(params, spec)
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
    for name, sides in by_name.items():
        if len(sides) == 1:
            raise ValueError(
                f"pairs: the spec names {name}.{'/'.join(sides)} without its other side."
            )
    return [Pair(name, sides["B"], sides["A"]) for name, sides in by_name.items()]


def _labels(params: Any, spec: PairsSpec) -> list[Any]:
    """The labels of all leaves; a module that can be called may be a spec as any other tree."""
    structure: Any = jax.tree.structure(params)
    called = callable(spec) and jax.tree_util.all_leaves([spec])
    tree = spec(params) if called else spec
    try:
        return structure.flatten_up_to(tree)
    except ValueError:
        if callable(spec) and not called:
            return _labels(params, lambda params: spec(params))
        found = jax.tree.structure(tree, is_leaf=lambda leaf: leaf is None)
        raise ValueError(
            "pairs: the spec must have the structure of the parameters, with None for a regular "
            f"leaf; the spec is {found}, the parameters are {structure}."
        ) from None


def _entry_name(entry: Any) -> str:
    """The bare name of a path entry, whatever kind of container it comes from."""
    for attribute in ("key", "name", "idx"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    return str(entry)
