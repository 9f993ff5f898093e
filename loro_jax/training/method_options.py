"""The fields of a config that its method uses, and the options that methods and directions have."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

from loro_jax.errors import TrainingError
from loro_jax.fields import check
from loro_jax.training.adapter_fields import check_adapter_field
from loro_jax.training.methods import DIRECTIONS, METHODS
from loro_jax.training.registry import options_of

if TYPE_CHECKING:
    from loro_jax.training.config import Config


class MethodOptions(dict[str, Any]):
    """The options of a run's method and direction that were set.

    Valid names depend on the method, so they are checked when it is known: see
    :func:`check_options`. An option that was not set has the method's default. Until then all
    options of the tables' entries are accepted, and reading one returns the first default found,
    from which the command line infers its type.

    Example:
        >>> options = MethodOptions(momentum=0.9)
        >>> options.momentum, options.eta
        (0.9, 0.04)
    """

    def __missing__(self, name: str) -> Any:
        """Returns the default of an option that was not set."""
        known: dict[str, Any] = {}
        # setdefault: several kinds may have a field of one name, with the same type.
        for kind in kinds_of_options():
            for one in dataclasses.fields(kind):
                known.setdefault(one.name, one.default)
        if name in known:
            return known[name]
        likely = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {likely[0]}?" if likely else f"expected one of {', '.join(known)}."
        raise KeyError(f"config.method_options has no field {name!r}; {hint}")

    def __getattr__(self, name: str) -> Any:
        """Returns an option, or its default."""
        # copy and pickle look for special methods before there is any content.
        if name.startswith("__"):
            raise AttributeError(name)
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(error.args[0]) from None

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets an option."""
        self[name] = value


def kinds_of_options() -> Iterator[type]:
    """Yields the options of all methods and directions."""
    yield from (method.options for method in METHODS.values())
    yield from (direction.options for direction in DIRECTIONS.values())


def _kinds_of(config: Config) -> list[type]:
    method = METHODS[config.method]
    kinds = [method.options]
    if "direction" in method.uses:
        kinds.append(DIRECTIONS[config.direction].options)
    return kinds


def resolved_options(config: Config) -> dict[str, Any]:
    """Returns the options that a config's method and direction use, with their values."""
    options: dict[str, Any] = {}
    for kind in _kinds_of(config):
        options |= dataclasses.asdict(options_of(kind, config))
    return {name: value for name, value in options.items() if name not in _unused(config)}


def _unused(config: Config) -> tuple[str, ...]:
    """Returns options of a config's direction that its method has no use for."""
    dense = METHODS[config.method].projection is None
    return DIRECTIONS[config.direction].of_factors if dense and takes_direction(config) else ()


def check_options(config: Config) -> None:
    """Raises ValueError for an option that the method lacks, or a value outside its range."""
    kinds = _kinds_of(config)
    known = [one.name for kind in kinds for one in dataclasses.fields(kind)]
    for name in config.method_options:
        if name not in known:
            of = f'config.method = "{config.method}"'
            if "direction" in METHODS[config.method].uses:
                of += f' with config.direction = "{config.direction}"'
            has = f"it has {', '.join(known)}" if known else "it has none"
            raise ValueError(f"method_options.{name}: {of} has no such option; {has}.")
        # Earlier versions stored the default in a run's config.
        if name in _unused(config) and config.method_options[name] != _default(kinds, name):
            raise ValueError(
                f"method_options.{name}: only factors use it, which config.method = "
                f'"{config.method}" has none of; expected it not to be set.'
            )
    for kind in kinds:
        check(options_of(kind, config), "method_options.")


def _default(kinds: list[type], name: str) -> Any:
    """Returns the default of an option of some kinds."""
    return next(getattr(kind(), name) for kind in kinds if hasattr(kind(), name))


def uses_field(config: Config, name: str) -> bool:
    """Returns whether a config's method uses a field, given by its dotted name."""
    if name.startswith("method_options."):
        options = {one.name for kind in _kinds_of(config) for one in dataclasses.fields(kind)}
        return name.partition(".")[2] in options.difference(_unused(config))
    if name == "direction" and not takes_direction(config):
        return False
    # Fields that no entry lists are read by the trainer itself, whatever the method.
    of_some = {field for method in METHODS.values() for field in method.uses}
    return name not in of_some or name in METHODS[config.method].uses


def takes_direction(config: Config) -> bool:
    """Returns whether a config's method supports its direction; dense projections not all."""
    method = METHODS[config.method]
    if "direction" not in method.uses:
        return False
    return method.projection is not None or DIRECTIONS[config.direction].dense is not None


def settled(config: Config, asked: Collection[str]) -> Config:
    """Drops options that a config's method does not use; refuses such fields if set explicitly.

    A config file and its settings may set fields that the chosen method does not use: these are
    ignored. A field that was set on the command line, or in an arm of a comparison, to a value
    other than its default must be used by the method.

    Args:
        config: the run's config.
        asked: dotted names of the fields that were set in addition to the config file.

    Raises:
        TrainingError: for a field that was set explicitly and is not used.
    """
    if config.method not in METHODS or config.direction not in DIRECTIONS:
        return config  # validate() reports it
    own = METHODS[config.method].adapter
    if own is not None and "adapter.kind" not in asked:
        # A config file for adapters names a kind; the method has another.
        config = dataclasses.replace(config, adapter=dataclasses.replace(config.adapter, kind=own))
    # Not by its name: config.py imports this module.
    default = type(config)()
    for name in asked:
        check_adapter_field(config, name)
        if uses_field(config, name):
            continue
        if name.startswith("method_options."):
            # The table's own error is more precise: it names the options that the method has.
            try:
                check_options(config)
            except ValueError as error:
                raise TrainingError(f"config.{error}") from None
        elif getattr(config, name) != getattr(default, name):
            takers = [other for other, method in METHODS.items() if name in method.uses]
            raise TrainingError(
                f'config.{name} = {getattr(config, name)!r}: config.method = "{config.method}" '
                f"does not use it; expected its default, {getattr(default, name)!r}, or a method "
                f"among {', '.join(takers)}."
            )
    options = {
        name: value
        for name, value in config.method_options.items()
        if uses_field(config, f"method_options.{name}")
    }
    return dataclasses.replace(config, method_options=MethodOptions(options))
