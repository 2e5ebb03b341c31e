"""Errors meant for the user: one line that names the thing and the way out.

The command line prints them without a traceback and exits with `exit_code`.
"""


class RvllmError(Exception):
    """A failure with a message that a user can act on."""

    exit_code = 1


class UsageError(RvllmError, ValueError):
    """A flag, environment variable or argument is wrong; a ValueError, as scripts written for vLLM expect."""

    exit_code = 2


class LimitError(UsageError):
    """What was asked for takes more time, memory or stack than one request may."""


class SlowClientError(RvllmError):
    """A client leaves so much of its answer unread that the rest is not made."""


class UnavailableError(RvllmError):
    """Something that the request needs does not answer at the moment; another try may succeed."""


class ModelError(RvllmError):
    """A model cannot be found, read or is not supported; the message names file and field."""

    exit_code = 2


class CapacityError(RvllmError):
    """Too little memory or disk; the message names the shortfall and the flags that would fit."""

    exit_code = 2


class MissingKernelError(RvllmError):
    """An op of the program has no kernel; the message lists all that are missing."""

    exit_code = 2


class EngineDeadError(RvllmError):
    """The engine process has ended while work was left; the message says why."""
