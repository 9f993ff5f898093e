"""Run directories, each locked by one process and tied to one config and one corpus."""

from __future__ import annotations

import fcntl
import json
import pathlib
from typing import IO, Any

from loro_jax.errors import InUseError, TrainingError
from loro_jax.training.config import Config
from loro_jax.training.config_differences import differences
from loro_jax.training.processes import is_first, together


class RunDirectory:
    """Context manager that locks a run directory for a config.

    The resolved config and the fingerprint of the text are written to a new directory; a directory
    of another run is refused before anything in it is changed. With several processes only the
    first one does this.

    Args:
        path: the directory; created if missing.
        config: the run's config.
        fingerprint: fingerprint of the run's tokens.

    Raises:
        TrainingError: if the directory holds a run with another config or text, or other files.
        InUseError: if another process has locked it.
    """

    def __init__(self, path: str | pathlib.Path, config: Config, fingerprint: str):
        self.path = pathlib.Path(path)
        self._config_path = self.path / "config.json"
        self._data_path = self.path / "data.json"
        self._lock: IO[str] | None = None
        together(lambda: self._open(config, fingerprint) if is_first() else None)

    def _open(self, config: Config, fingerprint: str) -> None:
        # Both checks come before the first change on disk.
        self._check(config)
        self._check_data(config, fingerprint)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            # Written last: its existence marks a complete run directory.
            _write_once(self._data_path, json.dumps({"fingerprint": fingerprint}) + "\n")
            _write_once(self._config_path, config.to_json())
        except OSError as error:
            raise TrainingError(
                f"--workdir={self.path} can't be written ({error.strerror})."
            ) from None
        self._lock = self._claim()

    def _check(self, config: Config) -> None:
        if self._config_path.exists():
            try:
                stored: dict[str, Any] = json.loads(self._config_path.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                raise TrainingError(
                    f"{self._config_path} can't be read as a run's config; use another --workdir."
                ) from None
            differing = differences(stored, config)
            if differing:
                raise TrainingError(
                    f"--workdir={self.path} holds a run of another config "
                    f"({'; '.join(differing)}). Use another --workdir, or this config to resume."
                )
        elif self.path.exists():
            if not self.path.is_dir():
                raise TrainingError(f"--workdir={self.path} is a file; expected a directory.")
            # All that a kill during `_open` can leave: such a directory may be used again.
            own = {"config.json.tmp", "data.json", "data.json.tmp"}
            others = [entry.name for entry in self.path.iterdir() if entry.name not in own]
            if others:
                raise TrainingError(
                    f"--workdir={self.path} is not empty and not a run directory (it holds "
                    f"{others[0]!r} but no config.json); use another --workdir."
                )

    def _check_data(self, config: Config, fingerprint: str) -> None:
        if not (self._config_path.exists() and self._data_path.exists()):
            return
        try:
            stored = json.loads(self._data_path.read_text(encoding="utf-8"))["fingerprint"]
        except (OSError, ValueError, KeyError, TypeError):
            raise TrainingError(
                f"{self._data_path} can't be read as a run's data; use another --workdir."
            ) from None
        if stored != fingerprint:
            raise TrainingError(
                f"config.data.source = {config.data.source!r} is not the text that the run in "
                f"--workdir={self.path} has read so far (fingerprint {fingerprint}, expected "
                f"{stored}). Restore the text, or use another --workdir."
            )

    def _claim(self) -> IO[str]:
        lock = self._config_path.open(encoding="utf-8")
        try:
            # The kernel releases this lock when the process ends, however it ends: no stale lock is
            # left.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            raise InUseError(f"--workdir={self.path} is in use by another process.") from None
        return lock

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            self._lock.close()


def _write_once(path: pathlib.Path, content: str) -> None:
    if not path.exists():
        temporary = path.with_name(f"{path.name}.tmp")
        try:
            temporary.write_text(content, encoding="utf-8")
            temporary.replace(path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
