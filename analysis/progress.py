"""Progress of long computations."""

from __future__ import annotations


class Progress:
    """Receives the progress of a run; the command line draws it as a bar. By default nothing is shown."""

    def begin(self, total: int) -> None:
        """Start: the run has `total` units of work."""

    def on(self, what: str) -> None:
        """Name the current task."""

    def advance(self, done: int) -> None:
        """Add `done` units of finished work."""

    def warn(self, message: str) -> None:
        """Show a warning."""

    def failed(self, error: BaseException) -> None:
        """Receive the exception behind a warning, for a traceback."""
