"""What an entry of the tables of methods and of directions says.

The tables are in :mod:`loro_jax.training.methods`. An entry is all that the trainer, its config,
the comparison and the memory table know of a method.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import jax
import optax

if TYPE_CHECKING:
    from loro_jax.training.config import Config

Optimizer: TypeAlias = optax.GradientTransformationExtraArgs


class Maintenance(NamedTuple):
    """What a method does to the model around the optimizer's step.

    Attributes:
        before: (step from 0, grads, params, fixed, opt_state) -> the same without the step, before
            the optimizer sees the gradients; or None.
        after: (steps taken, params, fixed, opt_state) -> the same without the steps; or None.
    """

    before: Callable[..., tuple[Any, Any, Any, Any]] | None = None
    after: Callable[..., tuple[Any, Any, Any]] | None = None


@dataclasses.dataclass
class NoOptions:
    """The options of a method, or of a direction, that has none."""


class Making(NamedTuple):
    """What an optimizer is made from.

    Attributes:
        config: of the run.
        schedule: its learning rate.
        options: the method's, an instance of its ``options``.
        mesh: the devices that share the work, a tree of the parameters' shardings on them, or None.
    """

    config: Config
    schedule: optax.Schedule
    options: Any
    mesh: Any

    @property
    def adam(self) -> dict[str, Any]:
        """Adam's constants, by the names of their arguments."""
        return {"b1": self.config.b1, "b2": self.config.b2, "eps": self.config.eps}

    @property
    def lr_scale(self) -> float:
        """The factor on the learning rate of the factors, 1 if the config has none."""
        return 1.0 if self.config.lr_scale is None else self.config.lr_scale


@dataclasses.dataclass(frozen=True)
class Method:
    """A method of training.

    Attributes:
        meaning: what it is, in one line.
        optimizer: makes its optimizer. Gradient clipping is not part of it.
        projection: the kind of projections that it trains, a key of
            :data:`loro_jax.layers.projections.PROJECTIONS`; None: dense ones.
        other_projections: further kinds that it trains if ``config.model.projection`` says so.
        uses: fields of the config that it reads and not every method does.
        options: a dataclass of fields that it alone has, ``config.method_options``.
        schedule: (config, schedule) -> the schedule, with restarts; None: as it is. It raises
            ValueError for a config that it can't follow.
        periodic: whether it does something every ``exact_every`` steps that it can't do without.
        maintenance: (config, options) -> what it does around the optimizer's step; or None.
    """

    meaning: str
    optimizer: Callable[[Making], Optimizer]
    projection: str | None = None
    other_projections: tuple[str, ...] = ()
    uses: tuple[str, ...] = ()
    options: type = NoOptions
    schedule: Callable[[Config, optax.Schedule], optax.Schedule] | None = None
    periodic: bool = False
    maintenance: Callable[[Config, Any], Maintenance] | None = None


@dataclasses.dataclass(frozen=True)
class Direction:
    """A direction that projections are moved along.

    Attributes:
        meaning: what it is, in one line.
        make: (config, options) -> the ``direction`` of :func:`loro_jax.loro`; None: its Adam.
        options: a dataclass of fields that it alone has, ``config.method_options``.
        lr_scale: ``lr_scale`` of :func:`loro_jax.loro` if the config has none.
        dense: (making, direction's options) -> an optimizer of dense projections, for the method
            "full"; None: it has no dense twin.
    """

    meaning: str
    make: Callable[[Config, Any], Any]
    options: type = NoOptions
    lr_scale: float | None = None
    dense: Callable[[Making, Any], Optimizer] | None = None


def projections_of_blocks(params: Any) -> Any:
    """Returns which leaves are projections of the blocks; embedding, head and norms are not."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[0].key == "blocks" and path[-1].key == "W", params
    )
