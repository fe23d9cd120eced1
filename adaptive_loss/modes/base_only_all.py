"""The base term alone, on all data."""

from __future__ import annotations

from adaptive_loss.modes import modes
from adaptive_loss.modes.base import Mode


@modes.register("base_only_all")
def base_only_all() -> Mode:
    """No auxiliaries, and the probe and select splits are trained on too: what holding them out costs."""
    return Mode(base_only=True, all_data=True)
