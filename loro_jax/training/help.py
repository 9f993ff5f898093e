"""The config's part of ``python train.py --help``: its fields, the methods, and their options."""

from __future__ import annotations

from loro_jax.fields import describe, help_lines
from loro_jax.training.config import Config
from loro_jax.training.config_differences import field_names
from loro_jax.training.glue_config import GlueRun
from loro_jax.training.methods import DIRECTIONS, METHODS


def config_help() -> list[str]:
    """Returns lines about every field: its default, meaning and range.

    Example:
        >>> lines = config_help()
        >>> lines[lines.index("  --config.steps=10000") + 1].strip()
        'optimizer steps in the run (a whole number, at least 1)'
    """
    lines = [
        "Fields of the config, with their defaults if the config file does not set them:",
        "",
    ]
    lines += help_lines(describe(Config()))
    shared = {(one.name, one.meaning, one.default) for one in describe(Config())}
    others = (
        one for one in describe(GlueRun()) if (one.name, one.meaning, one.default) not in shared
    )
    lines += ["", "Fields of runs on GLUE (configs/roberta_glue.py) that differ:", ""]
    lines += help_lines(others)
    lines += ["", "Values of --config.method, each with its own fields:", ""]
    for name, method in METHODS.items():
        lines += _entry(name, method.meaning, method.options)
    lines += ["", "Values of --config.direction, each with its own fields:", ""]
    for name, direction in DIRECTIONS.items():
        lines += _entry(name, direction.meaning, direction.options)
    return lines


def known_fields() -> list[str]:
    """Returns the dotted names of the fields of all kinds of runs, without ``--config.``."""
    return list(dict.fromkeys([*field_names(), *field_names(GlueRun())]))


def _entry(name: str, meaning: str, options: type) -> list[str]:
    described = help_lines(describe(options(), "method_options."))
    return [f"  {name}: {meaning}", *(f"  {line}" for line in described)]
