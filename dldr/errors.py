"""The exceptions that end a run in one line instead of a traceback."""
import signal


class UserError(ValueError):
    """A user error: the message is one line that names the flag or file and what to do."""


class Stopped(Exception):
    """Raised after SIGINT or SIGTERM."""

    def __init__(self, number, where=""):
        super().__init__(f"stopped by {signal.Signals(number).name} {where}".strip())
        self.number = number
