"""Metrics on disk: ``metrics.jsonl`` (one JSON object a row) and TensorBoard event files."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

from loro_jax.training.errors import cannot_write


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

    Raises:
        TrainingError: if the files can't be written; so do all methods.
    """

    def __init__(self, directory: pathlib.Path, resume_step: int, tensorboard: bool):
        self._path = directory / "metrics.jsonl"
        self._events_path = directory / "tensorboard"
        self._events: _Events | None = None
        kept = [row for row in read_rows(self._path) if row["step"] <= resume_step]
        # Written beside and renamed: a kill here must not cost the rows that are kept.
        temporary = self._path.with_suffix(".jsonl.tmp")
        try:
            with temporary.open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in kept)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self._path)
            # Unbuffered: what can't be written must not be tried again when the file is closed.
            self._file = self._path.open("ab", buffering=0)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise cannot_write(self._path, error) from None
        if tensorboard:
            try:
                self._events = _Events(self._events_path, resume_step + 1)
            except OSError as error:
                self._file.close()
                raise cannot_write(self._events_path, error) from None

    def write(self, row: dict[str, Any]) -> None:
        """Writes one row; ``step`` names its step. It is out of this process when this returns."""
        line = (json.dumps(row) + "\n").encode("utf-8")
        end = self._file.seek(0, os.SEEK_END)
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(end)  # no half a row
            raise cannot_write(self._path, error) from None
        self._to_events(lambda events: events.write(row))

    def sync(self) -> None:
        """Forces the rows onto the disk, before a checkpoint that counts on them."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise cannot_write(self._path, error) from None
        self._to_events(lambda events: events.flush())

    def close(self) -> None:
        """Closes the files."""
        self._file.close()
        self._to_events(lambda events: events.close())

    def _to_events(self, action: Callable[[_Events], None]) -> None:
        if self._events is None:
            return
        try:
            action(self._events)
        except OSError as error:
            self._events = None
            raise cannot_write(self._events_path, error) from None


class _Events:
    """TensorBoard's event files, written by the caller.

    tensorboardX's SummaryWriter writes by a thread: where that meets a full disk it dies with a
    traceback, and the run waits for it for ever.
    """

    def __init__(self, directory: pathlib.Path, purge_step: int):
        from tensorboardX import event_file_writer, summary
        from tensorboardX.proto import event_pb2

        self._event, self._scalar = event_pb2.Event, summary.scalar
        directory.mkdir(parents=True, exist_ok=True)
        self._writer = event_file_writer.EventsWriter(str(directory / "events"))
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._writer.write_event(self._event(step=purge_step, file_version="brain.Event:2"))
        self._writer.write_event(self._event(step=purge_step, session_log=start))

    def write(self, row: dict[str, Any]) -> None:
        for name, value in row.items():
            if name != "step":
                made = self._event(summary=self._scalar(name, value), step=row["step"])
                made.wall_time = time.time()
                self._writer.write_event(made)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
