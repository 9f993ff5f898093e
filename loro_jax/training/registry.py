"""The entries of the tables of methods and directions.

The tables are in :mod:`loro_jax.training.methods`. The trainer, its config, the comparison and the
memory table know a method only by its entry.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import jax
import optax
from flax import nnx

if TYPE_CHECKING:
    from loro_jax.training.config import Config

Optimizer: TypeAlias = optax.GradientTransformationExtraArgs


class Task(NamedTuple):
    """What a run trains: a network, and its loss on a batch. Batches are tuples of arrays.

    Attributes:
        make: () -> the network, a Flax NNX module, with the weights of the config's seed.
        loss: (network, batch) -> the sum of losses in training.
        number: batch -> the number of things that the sum is over.
        tokens: batch -> its number of tokens.
        evaluate: (network, batch) -> the outputs that an evaluation needs.
    """

    make: Callable[[], nnx.Module]
    loss: Callable[[Any, Any], jax.Array]
    number: Callable[[Any], jax.Array]
    tokens: Callable[[Any], jax.Array]
    evaluate: Callable[[Any, Any], Any]


class Maintenance(NamedTuple):
    """A method's changes to the model around the optimizer's step, and its own metrics.

    Attributes:
        before: (step from 0, grads, params, fixed, opt_state) -> (grads, params, fixed, opt_state),
            called before the optimizer sees the gradients; or None.
        after: (steps taken, params, fixed, opt_state) -> (params, fixed, opt_state); or None.
        metrics: (params, opt_state) after the step -> numbers for its row of metrics, by name; or
            None.
    """

    before: Callable[..., tuple[Any, Any, Any, Any]] | None = None
    after: Callable[..., tuple[Any, Any, Any]] | None = None
    metrics: Callable[[Any, Any], dict[str, jax.Array]] | None = None


@dataclasses.dataclass
class NoOptions:
    """The options of a method or direction that has none."""


def options_of(kind: type, config: Config) -> Any:
    """Returns options of a kind, with defaults for options that were not set.

    Args:
        kind: a dataclass, the ``options`` of an entry.
        config: the run's config. Options of its method and of its direction are in one dict.
    """
    names = {one.name for one in dataclasses.fields(kind)}
    return kind(**{name: value for name, value in config.method_options.items() if name in names})


class Making(NamedTuple):
    """The arguments from which an optimizer is made.

    Attributes:
        config: the run's config.
        schedule: the learning-rate schedule.
        options: the method's options, an instance of its ``options``.
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
        """Multiplier of the factors' learning rate, 1 if the config has none."""
        return 1.0 if self.config.lr_scale is None else self.config.lr_scale


@dataclasses.dataclass(frozen=True)
class Method:
    """A method of training.

    Attributes:
        meaning: a one-line description.
        optimizer: makes the optimizer, without gradient clipping.
        projection: the kind of projections that it trains, a key of
            :data:`loro_jax.layers.projections.PROJECTIONS`; None: dense projections.
        other_projections: further kinds that it trains if ``config.model.projection`` names them.
        uses: fields of the config that it reads, except those that every method reads.
        options: a dataclass of its own fields, ``config.method_options``.
        schedule: (config, schedule) -> the schedule with restarts; None: unchanged. Raises
            ValueError for a config that does not allow them.
        periodic: whether it requires ``exact_every`` to be at least 1.
        maintenance: (config, options) -> changes around the optimizer's step; or None.
        next_task: (options, state of another run of the method, new state) -> the state at
            the beginning of the next of several tasks, and a line to print (or ""); None: the
            method does not know of tasks.
        adapters: which adapters it trains if ``config.adapter.kind`` names one: "" none, "pairs"
            those with factors B and A, "any" all of them.
        adapter: the kind of adapter that it trains always; None: it needs none.
        merges: whether the adapters of a run in ``init_from`` are always merged, and new ones
            start, unless its optimizer's state is copied.
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
    next_task: Callable[..., Any] | None = None
    adapters: str = ""
    adapter: str | None = None
    merges: bool = False


@dataclasses.dataclass(frozen=True)
class Direction:
    """A direction of LORO's factors, and its counterpart for dense projections.

    Attributes:
        meaning: a one-line description.
        make: (config, options) -> the ``direction`` of :func:`loro_jax.loro`; None: its Adam.
        options: a dataclass of its own fields, ``config.method_options``.
        of_factors: names of options that only factors use, not dense projections.
        lr_scale: ``lr_scale`` of :func:`loro_jax.loro` if the config has none.
        dense: (making, direction's options) -> an optimizer of dense projections, for the method
            "full"; None: there is no dense counterpart.
    """

    meaning: str
    make: Callable[[Config, Any], Any]
    options: type = NoOptions
    of_factors: tuple[str, ...] = ()
    lr_scale: float | None = None
    dense: Callable[[Making, Any], Optimizer] | None = None


def projections_of_blocks(params: Any) -> Any:
    """Returns which leaves are projections of the blocks, not embedding, head or norms."""
    return jax.tree_util.tree_map_with_path(
        # The head's matrix is called W, too, but is not in the blocks.
        lambda path, _: path[0].key == "blocks" and path[-1].key == "W",
        params,
    )
