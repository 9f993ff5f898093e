"""The directory of a run: claimed by one process, and by one config, at a time."""

from __future__ import annotations

import fcntl
import json
import pathlib
from typing import IO, Any

from loro_jax.training.config import Config, differences
from loro_jax.training.errors import TrainingError


class RunDirectory:
    """Claims a run directory for a config; a context manager.

    A fresh directory gets the resolved config; one that holds another run's is refused before
    anything in it is touched.

    Args:
        path: the directory; made when missing.
        config: the run's config.

    Raises:
        TrainingError: if the directory holds a run of another config, files of something else, or
            is in use by another process.
    """

    def __init__(self, path: str | pathlib.Path, config: Config):
        self.path = pathlib.Path(path)
        self._config_path = self.path / "config.json"
        self._check(config)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if not self._config_path.exists():
                temporary = self.path / "config.json.tmp"
                temporary.write_text(config.to_json(), encoding="utf-8")
                temporary.replace(self._config_path)
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
                    f"({'; '.join(differing)}). Use another --workdir, or the same config to go on."
                )
        elif self.path.exists():
            if not self.path.is_dir():
                raise TrainingError(f"--workdir={self.path} is a file; expected a directory.")
            others = [
                entry.name for entry in self.path.iterdir() if entry.name != "config.json.tmp"
            ]
            if others:
                raise TrainingError(
                    f"--workdir={self.path} is not empty and no run directory (it holds "
                    f"{others[0]!r}, and no config.json); use another --workdir."
                )

    def _claim(self) -> IO[str]:
        lock = self._config_path.open(encoding="utf-8")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            raise TrainingError(f"--workdir={self.path} is in use by another process.") from None
        return lock

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()
