"""Which layers of a network become low-rank, and with which rank."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

# A path, such as "blocks/0/attention/query".
Where = str | Sequence[str] | Callable[[str, Any], bool] | None
Rank = int | float | Callable[[str, tuple[int, int]], int | float | None]

_SHOWN = 8


def select(layers: Mapping[str, Any], where: Where, caller: str) -> list[str]:
    """Selects layers by their paths.

    Args:
        layers: the layers of a network, by path.
        where: None: all of them. A pattern or several: ``*`` stands for anything within a part of a
            path, ``**`` for any number of parts; a pattern that begins with ``!`` excludes; one
            that names a module includes all that it contains. If all patterns exclude, everything
            else is selected. Or a predicate, called with path and layer.
        caller: name of the function that an error is raised by.

    Returns:
        The paths of the selected layers, in the order of the network.

    Raises:
        ValueError: if a pattern, or the predicate, matches no layer.

    Example:
        >>> layers = dict.fromkeys(["blocks/0/q", "blocks/0/v", "head"])
        >>> select(layers, ["blocks/**", "!**/v"], "factorise")
        ['blocks/0/q']
        >>> select(layers, "!head", "factorise")
        ['blocks/0/q', 'blocks/0/v']
    """
    if where is None:
        return list(layers)
    if callable(where):
        chosen = [path for path, layer in layers.items() if where(path, layer)]
        if not chosen:
            raise ValueError(
                f"{caller}: the predicate `where` selects no layer; {_described(layers)}."
            )
        return chosen
    patterns = [where] if isinstance(where, str) else list(where)
    for pattern in patterns:
        if not any(_matches(path, pattern.removeprefix("!")) for path in layers):
            raise ValueError(
                f"{caller}: where = {pattern!r} matches no layer; {_described(layers)}."
            )
    included = [p for p in patterns if not p.startswith("!")] or ["**"]
    excluded = [p[1:] for p in patterns if p.startswith("!")]
    chosen = [
        path
        for path in layers
        if any(_matches(path, p) for p in included) and not any(_matches(path, p) for p in excluded)
    ]
    if not chosen:
        raise ValueError(
            f"{caller}: where = {where!r} excludes every layer that it includes; "
            f"{_described(layers)}."
        )
    return chosen


def is_inclusive(where: Where) -> bool:
    """Returns whether every selected layer is one that the caller asked for."""
    if where is None or callable(where):
        return where is not None
    return any(not p.startswith("!") for p in ([where] if isinstance(where, str) else where))


def resolve_rank(rank: Rank, path: str, shape: tuple[int, int], caller: str) -> int | None:
    """Returns the rank of a layer.

    Args:
        rank: a whole number; a share of the smaller side, 0 < share <= 1, as a float; or a function
            of path and shape (m, n) that returns one of both, or None for a layer to leave dense.
        path: path of the layer.
        shape: outputs and inputs, (m, n).
        caller: name of the function that an error is raised by.

    Raises:
        ValueError: if the rank is not between 1 and min(m, n).
        TypeError: if it is no number.

    Example:
        >>> resolve_rank(0.25, "head", (100, 64), "factorise")
        16
    """
    value: Any = rank(path, shape) if callable(rank) else rank
    if value is None and callable(rank):
        return None
    smaller = min(shape)
    m, n = shape
    is_number = isinstance(value, float) or hasattr(value, "__index__")
    if isinstance(value, bool) or not is_number:
        raise TypeError(
            f"{caller}: the rank of {path!r} must be a whole number or a share of the smaller side "
            f"as a float, but is {value!r}."
        )
    if isinstance(value, float):
        if not 0 < value <= 1:
            raise ValueError(
                f"{caller}: the rank of {path!r}, as a share of the smaller side, must be above 0 "
                f"and at most 1, but is {value}; a whole number is a rank."
            )
        return max(1, round(value * smaller))
    chosen = int(value)
    if not 1 <= chosen <= smaller:
        raise ValueError(
            f"{caller}: the rank of {path!r}, {n} inputs to {m} outputs, must be between 1 and "
            f"{smaller}, but is {chosen}; choose another, or leave the layer out: where='!{path}'."
        )
    return chosen


def joined(path: Iterable[Any]) -> str:
    """Returns a path as text, with "/" between its parts."""
    return "/".join(map(str, path))


def _described(layers: Mapping[str, Any]) -> str:
    if not layers:
        return "the network has none that can be factorised"
    shown = ", ".join(list(layers)[:_SHOWN])
    more = f" and {len(layers) - _SHOWN} more" if len(layers) > _SHOWN else ""
    return f"its layers are: {shown}{more}"


def _matches(path: str, pattern: str) -> bool:
    """Returns whether a pattern fits a path, or a module that contains it."""
    return _regex(pattern).fullmatch(path) is not None


@functools.lru_cache(maxsize=256)
def _regex(pattern: str) -> re.Pattern[str]:
    parts = [
        "(?:[^/]+/)*" if part == "**" else re.escape(part).replace(r"\*", "[^/]*") + "/"
        for part in pattern.strip("/").split("/")
    ]
    whole = "".join(parts)
    # The end of a path needs no "/", and below a module everything fits.
    if pattern.rstrip("/").endswith("**"):
        return re.compile(whole + "[^/]+")
    return re.compile(whole[:-1] + "(?:/.*)?")
