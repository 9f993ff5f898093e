"""Metrics on disk: ``metrics.jsonl`` (one JSON object a row) and TensorBoard event files."""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any


def read_rows(path: pathlib.Path) -> list[dict[str, Any]]:
    """Rows of a metrics file, up to the first torn one (a killed process may leave half a line)."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


class MetricsWriter:
    """Appends rows to a run's metrics.

    Args:
        directory: the run directory.
        resume_step: rows behind this step are dropped: the run is about to write them again.
        tensorboard: whether to write event files too.
    """

    def __init__(self, directory: pathlib.Path, resume_step: int, tensorboard: bool):
        path = directory / "metrics.jsonl"
        kept = [row for row in read_rows(path) if row["step"] <= resume_step]
        # Written beside and renamed: a kill here must not cost the rows that are kept.
        temporary = path.with_suffix(".jsonl.tmp")
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in kept)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        self._file = path.open("a", encoding="utf-8")
        self._tensorboard: Any = None
        if tensorboard:
            import tensorboardX

            self._tensorboard = tensorboardX.SummaryWriter(
                str(directory / "tensorboard"), purge_step=resume_step + 1
            )

    def write(self, row: dict[str, Any]) -> None:
        """Writes one row; ``step`` names its step. It is out of this process when this returns."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        if self._tensorboard is not None:
            for name, value in row.items():
                if name != "step":
                    self._tensorboard.add_scalar(name, value, row["step"])

    def sync(self) -> None:
        """Forces the rows onto the disk, before a checkpoint that counts on them."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the files."""
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
