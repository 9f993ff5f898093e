"""Metrics on disk: ``metrics.jsonl`` (one JSON object per row) and TensorBoard event files."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pathlib
import socket
import struct
import time
from collections.abc import Callable, Sequence
from typing import Any

from loro_jax.errors import cannot_write


def read_rows(path: pathlib.Path) -> list[dict[str, Any]]:
    """Reads a metrics file up to the first incomplete row, as a killed process may leave it."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            # Whatever follows an incomplete row was written later, and is dropped with it.
            break
    return rows


def seconds_of_steps(rows: Sequence[dict[str, Any]]) -> float:
    """Sums the time of a run's steps, without evaluations and checkpoints.

    Args:
        rows: its rows with a loss, in order; each tells the speed since the one before it.

    Example:
        >>> rows = [{"tokens": 100, "tokens_per_second": 50}]
        >>> seconds_of_steps([*rows, {"tokens": 300, "tokens_per_second": 20}])
        12.0
    """
    seconds = 0.0
    for before, row in zip([{"tokens": 0}, *rows], rows, strict=False):
        if row["tokens_per_second"] > 0:  # 0 if the machine was suspended
            seconds += (row["tokens"] - before["tokens"]) / row["tokens_per_second"]
    return seconds


class MetricsWriter:
    """Appends rows to a run's metrics.

    Args:
        directory: the run directory.
        resume_step: rows after this step are dropped, because the run will write them again.
        tensorboard: whether to write event files too.
        name: name of the file.

    Raises:
        TrainingError: if the files can't be written; also raised by all methods.
    """

    def __init__(
        self,
        directory: pathlib.Path,
        resume_step: int,
        tensorboard: bool,
        name: str = "metrics.jsonl",
    ):
        self._path = directory / name
        self._events_path = directory / "tensorboard"
        self._events: _Events | None = None
        kept = [row for row in read_rows(self._path) if row["step"] <= resume_step]
        # Written to a temporary name and renamed, so that a kill here does not lose the kept rows.
        temporary = self._path.with_suffix(".jsonl.tmp")
        try:
            with temporary.open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in kept)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self._path)
            # Unbuffered: a failed write must not be retried when the file is closed.
            self._file = self._path.open("ab", buffering=0)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise cannot_write(self._path, error) from None
        if tensorboard:
            try:
                # TensorBoard hides events from this step on in files written before the
                # interruption.
                self._events = _Events(self._events_path, resume_step + 1)
            except OSError as error:
                self._file.close()
                raise cannot_write(self._events_path, error) from None

    def write(self, row: dict[str, Any]) -> None:
        """Writes one row; ``step`` is its step. The operating system has it when this returns."""
        try:
            _append(self._file, (json.dumps(row) + "\n").encode("utf-8"))
        except OSError as error:
            raise cannot_write(self._path, error) from None
        self._to_events(lambda events: events.write(row))

    def sync(self) -> None:
        """Syncs the rows to disk, before a checkpoint that relies on them."""
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
            raise cannot_write(self._events_path, error) from None


class _Events:
    """Writes TensorBoard event files synchronously.

    tensorboardX's SummaryWriter writes in a thread: on a full disk the thread dies with a
    traceback, and the run waits for it forever.
    """

    def __init__(self, directory: pathlib.Path, purge_step: int):
        from tensorboardX import record_writer, summary
        from tensorboardX.proto import event_pb2

        self._event, self._scalar = event_pb2.Event, summary.scalar
        self._checksum = record_writer.masked_crc32c
        directory.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}"
        self._file = (directory / name).open("ab", buffering=0)
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        try:
            # The first record of every event file names the format.
            self._write([{"file_version": "brain.Event:2"}])
            self._write([{"step": purge_step, "session_log": start}])
        except OSError:
            self._file.close()
            raise

    def write(self, row: dict[str, Any]) -> None:
        scalars = {name: value for name, value in row.items() if name != "step"}
        self._write(
            [
                {"step": row["step"], "summary": self._scalar(name, value)}
                for name, value in scalars.items()
            ]
        )

    def _write(self, events: list[dict[str, Any]]) -> None:
        """Appends events as TFRecords: length and content, each with its checksum."""
        records = b""
        for fields in events:
            data = self._event(wall_time=time.time(), **fields).SerializeToString()
            # The format: length, checksum of the length, content, checksum of the content.
            size = struct.pack("<Q", len(data))
            records += size + struct.pack("<I", self._checksum(size))
            records += data + struct.pack("<I", self._checksum(data))
        _append(self._file, records)

    def flush(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _append(file: io.FileIO, data: bytes) -> None:
    """Appends to an unbuffered file, all or nothing."""
    # Where to cut the file if the disk fills up in the middle of a row.
    end = file.seek(0, os.SEEK_END)
    try:
        while data:
            data = data[file.write(data) :]
    except OSError:
        with contextlib.suppress(OSError):
            file.truncate(end)
        raise
