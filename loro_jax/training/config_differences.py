"""How a stored config differs from that of a command, and the names of all fields."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from loro_jax.training.config import Config, resolved_moments_of
from loro_jax.training.method_options import kinds_of_options
from loro_jax.training.methods import DIRECTIONS, METHODS
from loro_jax.training.renamed import upgraded

# Fields that may differ when a run is resumed, because the trajectory and the metrics do not depend
# on them.
RESUMABLE_FIELDS = (
    "checkpoint_every",
    "keep_checkpoints",
    "inspect_every",
    "tensorboard",
    "mesh",
    "data.prefetch",
    "data.threads",
)


def differences(stored: dict[str, Any], config: Config) -> list[str]:
    """Lists the fields whose values differ between a stored config and this one.

    Args:
        stored: a parsed ``config.json``, of this version or an earlier one.
        config: the config of the current command.

    Returns:
        One string for each field: ``name: stored there, given now``; :data:`RESUMABLE_FIELDS` are
        skipped.
    """
    try:
        stored = upgraded(stored)
    except ValueError as error:
        return [str(error)]
    # Fields that an earlier version lacked had their defaults in its runs.
    defaults = type(config)()
    if stored.get("method") in METHODS and stored.get("direction", "adam") in DIRECTIONS:
        chosen = {name: stored[name] for name in ("method", "direction") if name in stored}
        defaults = dataclasses.replace(defaults, **chosen)
    old = _flatten(json.loads(defaults.to_json())) | _flatten(stored)
    new = _flatten(json.loads(config.to_json()))
    # "auto" and what it stands for are the same run.
    for fields in (old, new):
        fields["moments"] = resolved_moments_of(fields["moments"], fields["basis"])
    passed_over: tuple[str, ...] = RESUMABLE_FIELDS
    if any(old[name] != new[name] for name in ("method", "direction")):
        passed_over += ("method_options",)  # implied by the line about the method
    return [
        f"{name}: {old[name]!r} there, {new.get(name, '(absent)')!r} now"
        for name in sorted(old)
        if old[name] != new.get(name, "(absent)")
        and not any(name == free or name.startswith(f"{free}.") for free in passed_over)
    ]


def field_names(config: Config | None = None) -> list[str]:
    """Returns all dotted field names of a config, without ``--config.``.

    Args:
        config: a config of the kind; None: that of a language model.
    """
    options = {one.name for kind in kinds_of_options() for one in dataclasses.fields(kind)}
    of_group = [f"method_options.{name}" for name in sorted(options)]
    return [*_flatten(dataclasses.asdict(config or Config())), *of_group]


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
