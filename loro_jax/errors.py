"""The one exception that means: the user can mend this."""

from __future__ import annotations

import pathlib


class TrainingError(Exception):
    """A bad input or a run that can't go on. The message is one line for the user to act on."""


class DivergedError(TrainingError):
    """A run's loss, or its gradient, is no longer finite."""


class LostProcessError(TrainingError):
    """Another process of the run has ended; the rest must not wait for it."""


class InUseError(TrainingError):
    """Another process works in a run's directory."""


def cannot_write(path: pathlib.Path, error: OSError) -> TrainingError:
    """Returns what to say when a file of a run can't be written: a full disk, for one.

    Args:
        path: the file.
        error: why.
    """
    return TrainingError(
        f"{path} can't be written ({error.strerror or error}); earlier checkpoints are whole: make "
        "room and run the same command again."
    )
