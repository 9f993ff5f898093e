"""What goes wrong with a directory."""

from loro_jax.errors import TrainingError


class CheckpointError(TrainingError, ValueError):
    """A directory that can't be read or written: in one line what, and what was expected."""
