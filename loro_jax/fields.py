"""Fields of a config, defined once: type, default, range and meaning.

A config is a dataclass whose fields are created by :func:`field`. :func:`check` validates a config
by them, and :func:`describe` describes it for ``--help``.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import textwrap
import types
import typing
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple


class Range(NamedTuple):
    """The values that a field accepts.

    Attributes:
        words: () -> a phrase to follow "must be". Called late, because a table may have grown.
        holds: value -> whether it is in range.
        listed: whether the phrase lists all values, so that the type need not be named.
    """

    words: Callable[[], str]
    holds: Callable[[Any], bool]
    listed: bool = False


def at_least(least: float, below: float = math.inf) -> Range:
    """Returns the range of numbers from ``least``, included, to ``below``, excluded."""
    words = f"at least {least}" + ("" if below == math.inf else f" and below {below}")
    return Range(
        lambda: words, lambda value: least <= value and (below == math.inf or value < below)
    )


def above(bound: float, most: float = math.inf) -> Range:
    """Returns the range of finite numbers from ``bound``, excluded, to ``most``, included."""
    words = f"above {bound} and " + ("finite" if most == math.inf else f"at most {most}")
    return Range(lambda: words, lambda value: bound < value <= most and math.isfinite(value))


def between(least: float, most: float) -> Range:
    """Returns the range of numbers from ``least`` to ``most``, both included."""
    return Range(lambda: f"between {least} and {most}", lambda value: least <= value <= most)


def one_of(choices: Collection[str]) -> Range:
    """Returns the range of several names: a tuple, or the keys of a table, which may grow."""
    return Range(lambda: f"one of {', '.join(choices)}", lambda value: value in choices, True)


def either(one: str, other: str) -> Range:
    """Returns the range of two names."""
    return Range(lambda: f'"{one}" or "{other}"', lambda value: value in (one, other), True)


def field(default: Any, expected: Range | None, meaning: str) -> Any:
    """Returns a field of a dataclass.

    Args:
        default: its default.
        expected: its range; None: all values of its type.
        meaning: its description, for ``--help``.

    Example:
        >>> @dataclasses.dataclass
        ... class Run:
        ...     steps: int = field(100, at_least(1), "optimizer steps")
        >>> Run().steps
        100
        >>> try:
        ...     check(Run(steps=0))
        ... except ValueError as error:
        ...     print(error)
        steps must be at least 1, but is 0.
    """
    metadata = {"expected": expected, "meaning": meaning}
    return dataclasses.field(default=default, metadata=metadata)


def nested(kind: Callable[[], Any], meaning: str) -> Any:
    """Returns a field that is itself a config, created by ``kind()``."""
    return dataclasses.field(default_factory=kind, metadata={"meaning": meaning})


def check(config: Any, prefix: str = "") -> None:
    """Raises ValueError for the first field, except groups, whose value is not in its range.

    Args:
        config: an instance of a dataclass of fields.
        prefix: prefix of the fields' names in messages, for example ``model.``.

    Raises:
        ValueError: naming the field, its value, and the expected values.
    """
    types_ = typing.get_type_hints(type(config))
    for one in dataclasses.fields(config):
        if "expected" not in one.metadata:
            continue
        value, expected = getattr(config, one.name), one.metadata["expected"]
        kind, optional = _without_none(types_[one.name])
        if value is None and optional:
            continue
        # bool is a subclass of int: without the second condition True would pass as a number.
        of_type = isinstance(value, _TYPES[kind].takes) and (kind is bool) == isinstance(
            value, bool
        )
        if of_type and (expected is None or expected.holds(value)):
            continue
        words = expected.words() if expected and of_type else _words(kind, expected)
        raise ValueError(f"{prefix}{one.name} must be {words}, but is {value!r}.")


class Described(NamedTuple):
    """A field in words.

    Attributes:
        name: dotted, from the config's root.
        default: as written on the command line.
        expected: type and range.
        meaning: its description.
    """

    name: str
    default: str
    expected: str
    meaning: str


def describe(config: Any, prefix: str = "") -> Iterator[Described]:
    """Yields the fields of a config and of its groups, in their order.

    Args:
        config: an instance of a dataclass of fields; its values are the defaults.
        prefix: prefix of the fields' names.
    """
    types_ = typing.get_type_hints(type(config))
    for one in dataclasses.fields(config):
        value, meaning = getattr(config, one.name), one.metadata.get("meaning", "")
        if dataclasses.is_dataclass(value):
            yield from describe(value, f"{prefix}{one.name}.")
        elif "expected" in one.metadata:
            kind, optional = _without_none(types_[one.name])
            expected = one.metadata["expected"]
            words = _words(kind, expected) + (", or none" if optional else "")
            default = (
                "none" if value is None else str(value).lower() if kind is bool else str(value)
            )
            yield Described(f"{prefix}{one.name}", default, words, meaning)


def help_lines(described: Iterator[Described], flag: str = "--config.") -> list[str]:
    """Returns the lines about fields in a command's help: default, meaning and range of each.

    Args:
        described: from :func:`describe`.
        flag: what precedes a field's name on the command line.
    """
    lines = []
    for name, default, expected, meaning in described:
        lines.append(f"  {flag}{name}={default}")
        lines += textwrap.wrap(f"{meaning} ({expected})", 96, initial_indent=" " * 6,
                               subsequent_indent=" " * 6)  # fmt: skip
    return lines


class _Type(NamedTuple):
    takes: Any
    words: str


_TYPES = {
    int: _Type(numbers.Integral, "a whole number"),
    float: _Type(numbers.Real, "a number"),
    str: _Type(str, "text"),
    bool: _Type(bool, "true or false"),
}


def _words(kind: Any, expected: Range | None) -> str:
    """Returns the type and the range of a field."""
    if expected is None:
        return _TYPES[kind].words
    return expected.words() if expected.listed else f"{_TYPES[kind].words}, {expected.words()}"


def _without_none(kind: Any) -> tuple[Any, bool]:
    """Returns T for ``T | None``, and whether None was allowed."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        rest = [one for one in typing.get_args(kind) if one is not type(None)]
        return rest[0], len(rest) < len(typing.get_args(kind))
    return kind, False
