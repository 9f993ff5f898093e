"""The error for directories that can't be read or written."""

from loro_jax.errors import TrainingError


class CheckpointError(TrainingError, ValueError):
    """A directory can't be read or written; one line says why and what was expected."""
