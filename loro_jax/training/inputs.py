"""What the loop needs to know about the text, tables or weights that a run is made of."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from loro_jax.training.config import Config
from loro_jax.training.step import TrainState

Row = dict[str, Any]


class TrainIterator(Iterator[Any], Protocol):
    """An endless iterator over this process's rows of batches, with a position."""

    def position(self) -> dict[str, np.ndarray]:
        """Returns the position, the same in every process."""

    def seek(self, position: dict[str, np.ndarray]) -> None:
        """Restores a position."""


class Inputs(Protocol):
    """The validated inputs of a run, of one kind of task.

    Attributes:
        config: the run's config, resolved.
        devices: the mesh.
        fingerprint: identifies the data.
        notes: lines to show about the data.
        validation: batches of the validation set, the same in every process.
        perplexity: whether losses are shown as perplexities, too.
    """

    config: Config
    devices: jax.sharding.Mesh
    fingerprint: str
    notes: Sequence[str]
    validation: Sequence[Any]
    perplexity: bool

    def iterator(self, rows: Sequence[int]) -> TrainIterator:
        """Returns the iterator over training batches, of these rows of the global batch."""

    def batch(self, rows: Any) -> Any:
        """Returns the batch of what the iterator yields, a tuple of arrays."""

    def start(self, state: TrainState) -> tuple[TrainState, list[str]]:
        """Loads weights that the config names into a new state; returns it and lines about them."""

    def introduction(self, path: pathlib.Path) -> list[str]:
        """Returns lines to show at the start of a new run."""

    def evaluation(self, outputs: list[Any]) -> Row:
        """Returns an evaluation's fields, ``val_loss`` first, from the outputs of all batches."""

    def finish(
        self,
        rows: list[Row],
        last: Row,
        workdir: str,
        command: str,
        state: TrainState,
        live_ranks: int | None,
    ) -> list[str]:
        """Plots a complete run; returns lines to show at its end.

        Args:
            rows: all rows of its metrics.
            last: its last evaluation.
            workdir: the run directory.
            command: the command of the run.
            state: shapes and dtypes of its state.
            live_ranks: ranks that its adapters have at the end, if its method chooses them.
        """
