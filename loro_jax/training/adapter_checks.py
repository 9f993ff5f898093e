"""Checks of the adapters that a run trains, whatever its network is."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from loro_jax.layers.adapters import ADAPTERS
from loro_jax.training.methods import METHODS

if TYPE_CHECKING:
    from loro_jax.training.config import Config


def check_adapters(config: Config, sides: Mapping[str, int], rest: Collection[str]) -> None:
    """Raises ValueError if a run's method does not train its adapters, or a field is out of range.

    Args:
        config: config of a run that has adapters.
        sides: smaller side of each projection that can have one, by name.
        rest: names of what else can be trained.
    """
    adapter, kind = config.adapter, config.adapter_kind
    fitting = [name for name in METHODS if _trains(name, kind)]
    implied = METHODS[config.method].adapter == kind and adapter.kind in ("none", kind)
    if config.method not in fitting or (METHODS[config.method].adapter and not implied):
        raise ValueError(
            f"adapter.kind = {adapter.kind!r}: method {config.method!r} does not train such "
            f"adapters; expected a method among {', '.join(fitting)}."
        )
    if config.method_options.get("b_ratio", 1) != 1 and not ADAPTERS[kind].has_pair:
        raise ValueError(
            f"method_options.b_ratio = {config.method_options['b_ratio']}: adapters of kind "
            f"{kind!r} have no factors B and A; expected 1."
        )
    for name in adapter.names:
        if name not in sides:
            raise ValueError(
                f"adapter.targets must be all, or names among {', '.join(sides)} with commas, but "
                f"is {adapter.targets!r}."
            )
        if adapter.rank > sides[name]:
            raise ValueError(
                f"adapter.rank must be at most {sides[name]}, the smaller side of {name!r}, but is "
                f"{adapter.rank}."
            )
    for name in adapter.trained.split(",") if adapter.trained else []:
        if name not in rest:
            raise ValueError(
                f"adapter.trained must be names among {', '.join(rest)} with commas, but is "
                f"{adapter.trained!r}."
            )


def _trains(method: str, kind: str) -> bool:
    entry = METHODS[method]
    takes = {"any": True, "pairs": ADAPTERS[kind].has_pair, "": False}
    return entry.adapter == kind or takes[entry.adapters]
