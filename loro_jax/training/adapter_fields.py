"""Checks that the fields of adapters that a user sets have an effect."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loro_jax.errors import TrainingError
from loro_jax.layers.adapters import ADAPTERS

if TYPE_CHECKING:
    from loro_jax.training.config import Config

# Fields that not all kinds read.
_OF_SOME = frozenset(name for kind in ADAPTERS.values() for name in kind.uses)


def check_adapter_field(config: Config, name: str) -> None:
    """Raises TrainingError for a field of adapters that was set, but has no effect.

    Args:
        config: the run's config.
        name: dotted name of the field; others than those of adapters are passed over.
    """
    group, _, field = name.partition(".")
    if group != "adapter":
        return
    source = config.adapter.init_from
    if source is not None:
        if field not in ("init_from", "trained"):
            raise TrainingError(
                f"config.{name} follows from config.adapter.init_from = {source!r}; expected it "
                "not to be set."
            )
        return
    kind = config.adapter_kind
    if kind == "none" and field == "kind":
        return  # said, but the same
    if kind == "none":
        raise TrainingError(
            f"config.{name} is for adapters, but config.adapter.kind = {config.adapter.kind!r}; "
            "expected a kind of adapter, such as --config.adapter.kind=lora."
        )
    if kind in ADAPTERS and field in _OF_SOME and field not in ADAPTERS[kind].uses:
        takers = [other for other, entry in ADAPTERS.items() if field in entry.uses]
        raise TrainingError(
            f"config.{name}: adapters of kind {kind!r} do not use it; expected it not to be set, "
            f"or a kind among {', '.join(takers)}."
        )
