"""The one exception that means: the user can mend this."""


class TrainingError(Exception):
    """A bad input or a run that can't go on. The message is one line for the user to act on."""


class DivergedError(TrainingError):
    """A run's loss, or its gradient, is no longer finite."""


class LostProcessError(TrainingError):
    """Another process of the run has ended; the rest must not wait for it."""


class InUseError(TrainingError):
    """Another process works in a run's directory."""
