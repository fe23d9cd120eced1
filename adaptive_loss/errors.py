"""The errors that a command turns into one line and an exit code."""

from __future__ import annotations


class UsageError(ValueError):
    """What was asked for cannot be done as written: names the flag or term and the fix (exit code 2)."""


class RunError(RuntimeError):
    """What was asked for failed while it ran: names the file or run and what to do next (exit code 1)."""


class Stopped(KeyboardInterrupt):
    """Somebody asked the process to end, and what has been done is saved.

    Args:
        reason: who asked, as the start of a line: ``"stopped by SIGTERM"``.
        code: exit code, 128 + the signal's number as shells have it.
    """

    def __init__(self, reason: str, code: int) -> None:
        super().__init__(reason)
        self.code = code
