"""The base term alone."""

from __future__ import annotations

from adaptive_loss.modes import modes
from adaptive_loss.modes.base import Mode


@modes.register("base_only")
def base_only() -> Mode:
    """No auxiliaries, so that nobody wins against terms that only do harm."""
    return Mode(base_only=True)
