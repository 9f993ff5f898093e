"""Exceptions that the user can act on."""

from __future__ import annotations

import pathlib


class TrainingError(Exception):
    """Invalid input or a run that can't continue; the one-line message says what to do."""


class DivergedError(TrainingError):
    """A run's loss or gradient is no longer finite."""


class LostProcessError(TrainingError):
    """Another process of the run has ended; the others must not wait for it."""


class InUseError(TrainingError):
    """Another process uses a run's directory."""


def cannot_write(path: pathlib.Path, error: OSError) -> TrainingError:
    """Returns the error for a file of a run that can't be written, for example on a full disk.

    Args:
        path: the file.
        error: the cause.
    """
    return TrainingError(
        f"{path} can't be written ({error.strerror or error}); earlier checkpoints are whole: make "
        "room and run the same command again."
    )
