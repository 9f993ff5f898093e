"""Fields of a config that were renamed or removed.

Stored configs of runs and arms of comparisons may use the old names; the command line answers an
old name with the new one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from loro_jax.training.methods import DIRECTIONS, METHODS


class Renamed(NamedTuple):
    """The present name of a field.

    Attributes:
        name: the dotted name.
        values: present values by old values; other values are unchanged.
        methods: methods that read the field under its old name; empty: all.
    """

    name: str
    values: Mapping[Any, str] = {}
    methods: tuple[str, ...] = ()


RENAMED: dict[str, Renamed] = {
    "refresh": Renamed("moments", {"all": "reset", "factors": "reset_factors", "none": "keep"}),
    "momentum": Renamed("method_options.momentum", methods=("loro", "full")),
    "projection_scale": Renamed("method_options.scale", methods=("galore", "fira", "adarankgrad")),
}

# Removed fields, and the value for which they had no effect.
REMOVED: dict[str, Any] = {"exact_until": 0, "model.depth_scaled": False}


def present(name: str, value: Any) -> tuple[str, Any] | None:
    """Returns the present name and value of a field that may have an old name.

    Args:
        name: the dotted name.
        value: its value.

    Returns:
        Name and value; None for a removed field that had no effect.

    Raises:
        ValueError: for a removed field that had an effect.

    Example:
        >>> present("refresh", "none"), present("steps", 3), present("exact_until", 0)
        (('moments', 'keep'), ('steps', 3), None)
    """
    if name in REMOVED:
        if value == REMOVED[name]:
            return None
        raise ValueError(f"config.{name} = {value!r}: there is no such field any more.")
    if name not in RENAMED:
        return name, value
    now = RENAMED[name]
    return now.name, now.values.get(value, value) if isinstance(value, str) else value


def upgraded(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the stored config of a run with the present names.

    Args:
        stored: a parsed ``config.json``, of this version or an earlier one.

    Raises:
        ValueError: for a removed field that had an effect.
    """
    new = {
        name: dict(value) if isinstance(value, dict) else value for name, value in stored.items()
    }
    for old in (*RENAMED, *REMOVED):
        group, _, name = old.rpartition(".")
        holder = new.get(group) if group else new
        # Files of this version have none of these names.
        if not isinstance(holder, dict) or name not in holder:
            continue
        found = present(old, holder.pop(name))
        if found is None:
            continue
        group, _, name = found[0].rpartition(".")
        # Earlier versions stored the options of all methods; those of other methods are dropped.
        readers = RENAMED[old].methods
        if not readers or (new.get("method") in readers and name in _options_of(new)):
            # A value under the present name takes precedence.
            (new.setdefault(group, {}) if group else new).setdefault(name, found[1])
    return new


def _options_of(stored: Mapping[str, Any]) -> set[str]:
    """Returns the names of the options of a stored config's method and direction."""
    method = METHODS.get(stored.get("method", "loro"))
    kinds = [method.options] if method else []
    if method and "direction" in method.uses:
        direction = DIRECTIONS.get(stored.get("direction", "adam"))
        kinds += [direction.options] if direction else []
    return {one.name for kind in kinds for one in dataclasses.fields(kind)}


def old_name_message(name: str) -> str | None:
    """Returns a message about an old name on the command line; None for other names.

    Args:
        name: a field's name, without its group.
    """
    for old, now in RENAMED.items():
        if old == name:
            values = ", ".join(f"{one} is now {other}" for one, other in now.values.items())
            return f"config.{old} is now config.{now.name}" + (f" ({values})" if values else "")
    for old in REMOVED:
        if old.rpartition(".")[2] == name:
            return f"config.{old} is gone: there is no such field any more"
    return None
