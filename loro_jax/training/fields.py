"""Sets fields of a config by their dotted names, for commands other than ``train.py``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from loro_jax.errors import TrainingError
from loro_jax.training.config import Config
from loro_jax.training.method_options import MethodOptions
from loro_jax.training.renamed import present


def set_field(config: Config, name: str, value: Any) -> str:
    """Sets a field of a config by its dotted name, which may be an old one.

    Args:
        config: the config, changed in place.
        name: as after ``--config.``.
        value: the new value.

    Returns:
        The field's present name.

    Raises:
        AttributeError: if there is no such field.
        TrainingError: if the field was removed, and the value would have had an effect.
    """
    try:
        found = present(name, value)
    except ValueError as error:
        raise TrainingError(str(error)) from None
    if found is None:
        return name
    # Only now is the name split: its present name may be in another group.
    name, value = found
    *groups, field = name.split(".")
    target: Any = config
    for group in groups:
        target = getattr(target, group)
    if isinstance(target, MethodOptions):
        getattr(target, field)  # raises if no method has it
    elif not dataclasses.is_dataclass(target) or field not in {
        known.name for known in dataclasses.fields(target)
    }:
        raise AttributeError(name)
    setattr(target, field, value)
    return name


def parse_change(text: str) -> tuple[str, Any]:
    """Splits ``FIELD=VALUE``.

    Args:
        text: a dotted field and a value, as JSON or a plain string.

    Returns:
        The field's name and its value.

    Raises:
        ValueError: if there is no "=".

    Example:
        >>> parse_change("model.rank=16"), parse_change("lr_scale=null")
        (('model.rank', 16), ('lr_scale', None))
    """
    name, separator, value = text.partition("=")
    if not separator:
        raise ValueError(text)
    try:
        # As JSON first, in which numbers, booleans and null have their types.
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def apply_changes(config: Config, changes: Sequence[str], option: str = "--set") -> None:
    """Sets fields of a config, in place.

    Args:
        config: the config, changed in place.
        changes: ``FIELD=VALUE`` each.
        option: the command line's option, for the message.

    Raises:
        TrainingError: for a field that does not exist, or text without a value.
    """
    for change in changes:
        try:
            set_field(config, *parse_change(change))
        except (AttributeError, ValueError):
            raise TrainingError(
                f"{option} {change}: expected FIELD=VALUE with a field of the config."
            ) from None
