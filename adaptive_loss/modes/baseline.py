"""The start weights, held fixed."""

from __future__ import annotations

from adaptive_loss.modes import modes
from adaptive_loss.modes.base import Mode


@modes.register("baseline")
def baseline() -> Mode:
    """No modulators."""
    return Mode()
