"""Finding the low-rank pairs in any parameter tree.

A pair is a :class:`loro_jax.LowRank` node, or two sibling leaves named ``B`` and ``A`` under one
parent: entries of a dict, attributes of a dataclass, variables of an ``nnx.State``, boxed Linen
parameters. All of these are visible in a leaf's path, so one rule finds them all: skip the entry by
which Flax's boxes hold their array, and take the leaves whose paths differ only in the last entry,
``B`` or ``A``.

Names can mislead, so two cases are excluded: siblings that are both square (the matrices of a
state-space model, for example; such a product has no fixed rank), with a warning, unless "all" says
that no names mislead here; and a factor that modules share, which a tree contains in only one of
them, with an error.
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

# A pair of arrays, flags or shardings: the first belongs to B, the second to A.
Both = tuple[Any, Any]

# Flax's boxes: nnx variables and Linen's parameters with metadata. Each holds its array in an
# attribute. The classes are recognised by name, because Flax may not be installed.
_BOXES = ("Variable", "VariableState", "AxisMetadata")

_Path = tuple[Any, ...]


class Pair(NamedTuple):
    """The positions of a pair's two factors in ``jax.tree.leaves`` of the parameters."""

    name: str
    B: int
    A: int


def find_pairs(params: Any, spec: PairsSpec | None = None) -> list[Pair]:
    """Finds the low-rank pairs of a parameter tree.

    Args:
        params: any pytree of arrays (or of anything with a ``shape``).
        spec: None to detect the pairs automatically; ``"all"`` to take B and A for a pair even if
            both are square. Otherwise a tree with the structure of ``params`` (or a callable that
            returns one, given ``params``) whose leaves are None for a regular parameter and
            ``"NAME.B"`` or ``"NAME.A"`` for the factors of the pair NAME.

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
    check_spec(spec)
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    if spec is None or isinstance(spec, str):
        pairs = _found_by_path(params, square=spec == "all")
    else:
        pairs = _named_by_spec(params, leaves, spec)
    for pair in pairs:
        B, A = leaves[pair.B][1], leaves[pair.A][1]
        # Optax's tree utilities call init with placeholders that have no shape.
        if hasattr(B, "shape") and hasattr(A, "shape"):
            where = f"the pair {pair.name!r} (name it in pairs=..., or leave it out there)"
            check_factors(B, A, where)
            check_real(B, A, where)
    return sorted(pairs, key=lambda pair: min(pair.B, pair.A))


@dataclasses.dataclass(frozen=True)
class Pairs:
    """The pairs of a parameter tree: takes them out of trees like it and puts them back.

    Whole trees have all leaves of the parameters. Trees of factors, the first that :meth:`split`
    returns, have ``optax.MaskedNode`` in place of other leaves.

    Attributes:
        found: positions of the pairs among the leaves of a whole tree.

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
        """Splits a whole tree into its factors and all other leaves."""
        leaves, structure = jax.tree.flatten(tree)
        # A MaskedNode has no leaves: jax.tree.map over one of the two trees skips the other's part.
        hole = optax.MaskedNode()
        factors = [leaf if i in self._indices else hole for i, leaf in enumerate(leaves)]
        others = [hole if i in self._indices else leaf for i, leaf in enumerate(leaves)]
        return jax.tree.unflatten(structure, factors), jax.tree.unflatten(structure, others)

    def join(self, like: Any, factors: Any, others: Any) -> Any:
        """Joins the two trees that :meth:`split` returns, with the structure of ``like``."""
        leaves, structure = jax.tree.flatten(like)
        # Both trees have their leaves in the order of the whole tree.
        of_factors, of_others = iter(jax.tree.leaves(factors)), iter(jax.tree.leaves(others))
        return jax.tree.unflatten(
            structure,
            [next(of_factors if i in self._indices else of_others) for i in range(len(leaves))],
        )

    def take(self, factors: Any) -> list[Both]:
        """Returns the leaves of a tree of factors as (B, A) of each pair."""
        leaves = jax.tree.leaves(factors)
        return [(leaves[b], leaves[a]) for b, a in self._places]

    def put(self, like: Any, values: Sequence[Both]) -> Any:
        """Returns a tree of factors with the structure of ``like`` and these values of (B, A)."""
        leaves, structure = jax.tree.flatten(like)
        for (b, a), (of_B, of_A) in zip(self._places, values, strict=True):
            leaves[b], leaves[a] = of_B, of_A
        return jax.tree.unflatten(structure, leaves)

    def map(self, fn: Callable[..., Both], *trees: Any) -> Any:
        """Maps ``fn((B, A), ...)`` over the pairs of trees of factors.

        Leaves outside of pairs (a direction may step these, too) are taken from the last tree.
        """
        columns = [self.take(tree) for tree in trees]
        return self.put(trees[-1], [fn(*row) for row in zip(*columns, strict=True)])

    def choose(self, leaves: Sequence[Any]) -> tuple[list[Both], list[Any]]:
        """Splits the list of a whole tree's leaves into (B, A) of each pair and the rest."""
        rest = [leaf for i, leaf in enumerate(leaves) if i not in self._indices]
        return [(leaves[pair.B], leaves[pair.A]) for pair in self.found], rest

    @property
    def _indices(self) -> set[int]:
        return {index for pair in self.found for index in (pair.B, pair.A)}

    @property
    def _places(self) -> list[tuple[int, int]]:
        """Positions of each pair's factors among the leaves of a tree of factors."""
        # Only factors are leaves there, so that positions in the whole tree have to be counted
        # anew.
        order = sorted(self._indices)
        return [(order.index(pair.B), order.index(pair.A)) for pair in self.found]


def pairs_of(params: Any, spec: PairsSpec | None = None) -> Pairs:
    """Finds the pairs that an optimizer steps.

    Args:
        params: the parameters.
        spec: as for :func:`find_pairs`, or ``"optional"``: detected automatically, possibly none.

    Returns:
        The pairs.

    Raises:
        ValueError: if there is none and the spec is neither "optional" nor "all"; and as
            :func:`find_pairs`.
    """
    optional = isinstance(spec, str)
    found = find_pairs(params, spec)
    # optax.tree.map_params and partitions use an empty tree for "no parameters".
    if not found and not optional and jax.tree.leaves(params):
        raise ValueError(
            "loro: no low-rank pair found. Looked for LowRank nodes and for sibling leaves named "
            f"'B' (..., m, r) and 'A' (..., r, n); the tree holds {describe_leaves(params)}. Name "
            'the pairs with pairs=..., or pass pairs="optional" if there may be none.'
        )
    return Pairs(tuple(found))


def check_spec(spec: PairsSpec | None) -> None:
    """Raises ValueError for a word other than "optional" and "all"."""
    if isinstance(spec, str) and spec not in ("optional", "all"):
        raise ValueError(f'loro: pairs must be None, "optional", "all" or a spec, but is {spec!r}.')


def describe_leaves(params: Any, limit: int = 12) -> str:
    """Lists the paths and shapes of a tree's leaves, for error messages."""
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    lines = [
        f"{jax.tree_util.keystr(path)}: {tuple(getattr(leaf, 'shape', ()))}"
        for path, leaf in leaves[:limit]
    ]
    if len(leaves) > limit:
        lines.append(f"and {len(leaves) - limit} more")
    return "; ".join(lines) or "no leaf at all"


def _found_by_path(params: Any, square: bool) -> list[Pair]:
    """Finds leaves named B and A under one parent.

    Args:
        params: the parameters.
        square: whether two square leaves are a pair, too.
    """
    by_parent: dict[_Path, dict[str, int]] = {}
    held_back: set[_Path] = set()
    leaves: list[Any] = []
    for path, leaf in _unboxed(params):
        side = _entry_name(path[-1]) if path else ""
        if leaf is _NOTHING:
            # A partner that is masked or None was left out on purpose; a lone factor next to it
            # isn't suspected of being shared.
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
        # A LowRank node is a pair by declaration, even if its factors are square.
        elif square or parent in nodes or not _both_square(leaves[sides["B"]], leaves[sides["A"]]):
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

    A tree contains a shared parameter in only one of its modules. An exact step changes the basis
    of a factor, so another module that multiplies by it would become inconsistent.
    """
    ((side, index),) = sides.items()
    other = "A" if side == "B" else "B"
    for pair in pairs:
        # The lone factor in the place of the pair's own: if the product exists, it may be a shared
        # one.
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


# Stands for a hole instead of a leaf: None, or Optax's node for a masked leaf.
_NOTHING = object()


def _unboxed(params: Any) -> Iterator[tuple[_Path, Any]]:
    """Yields leaves and holes with their paths, without the entries of boxes."""
    nodes = jax.tree_util.tree_flatten_with_path(
        params, is_leaf=lambda node: _is_box(node) or not jax.tree.leaves(node)
    )[0]
    for path, node in nodes:
        inside = jax.tree_util.tree_flatten_with_path(node)[0]
        if not inside:
            yield path, _NOTHING
        # The box's own entry is dropped: nnx.Optimizer shows paths with it to `init` and without it
        # to `update`, and both must find the same pairs.
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
    """Returns the paths of the LowRank nodes."""
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
    """Returns the labels of all leaves; a callable module may also be a spec, like any tree."""
    structure: Any = jax.tree.structure(params)
    # A function is a leaf; a module with `__call__` is a node, and may be the spec itself.
    called = callable(spec) and jax.tree_util.all_leaves([spec])
    tree = spec(params) if called else spec
    try:
        return structure.flatten_up_to(tree)
    except ValueError:
        # Its structure does not fit, so this node was meant to be called after all.
        if callable(spec) and not called:
            return _labels(params, lambda params: spec(params))
        found = jax.tree.structure(tree, is_leaf=lambda leaf: leaf is None)
        raise ValueError(
            "pairs: the spec must have the structure of the parameters, with None for a regular "
            f"leaf; the spec is {found}, the parameters are {structure}."
        ) from None


def _entry_name(entry: Any) -> str:
    """Returns the bare name of a path entry, for any kind of container."""
    for attribute in ("key", "name", "idx"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    return str(entry)
