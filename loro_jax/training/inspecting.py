"""Small tables of a run's products and factors, written as it trains."""

from __future__ import annotations

import pathlib
from typing import Any

from loro_jax.inspection.matrices import small_tables
from loro_jax.training.config import Config
from loro_jax.training.metrics import MetricsWriter
from loro_jax.training.processes import is_first


class Inspection:
    """Writes ``inspect.jsonl``: a row every ``config.inspect_every`` steps, and one at the start.

    Singular values come from the factors, by the SVD of r x r matrices on the host in float64. The
    state is only read.

    Args:
        config: the run's config.
        path: the run directory.
        start: the step at which the run starts or resumes; rows after it are dropped.
        state: the training state at that step.
        tokens: tokens so far.
        is_new: whether the run starts, instead of resuming.
    """

    def __init__(
        self, config: Config, path: pathlib.Path, start: int, state: Any, tokens: int, is_new: bool
    ):
        self._every = config.inspect_every
        self._writer: MetricsWriter | None = None
        if not self._every:
            return
        if is_first():
            # A row of the start, too, is written again.
            kept = start - 1 if is_new else start
            self._writer = MetricsWriter(path, kept, tensorboard=False, name="inspect.jsonl")
        if is_new:
            self.write(start, state, tokens)

    def is_due(self, step: int) -> bool:
        """Returns whether a row is written after this step."""
        return self._every > 0 and step % self._every == 0

    def write(self, step: int, state: Any, tokens: int) -> None:
        """Writes the row of a step; every process calls this."""
        # Factors that are spread over processes are gathered by all of them.
        tables = small_tables(state.params)
        if self._writer is not None:
            self._writer.write({"step": step, "tokens": tokens, "matrices": tables})

    def sync(self) -> None:
        """Syncs the rows to disk, before a checkpoint that relies on them."""
        if self._writer is not None:
            self._writer.sync()

    def close(self) -> None:
        """Closes the file."""
        if self._writer is not None:
            self._writer.close()
