"""What goes wrong with a directory."""


class CheckpointError(ValueError):
    """A directory that can't be read or written: in one line what, and what was expected."""
