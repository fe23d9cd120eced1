"""The Meta-Learning Controller alone."""

from __future__ import annotations

from adaptive_loss.meta_controller import MetaController
from adaptive_loss.modes import modes
from adaptive_loss.modes.base import Mode


@modes.register("controller_only")
def controller_only() -> Mode:
    """The controller with its policy's law."""
    return Mode(lambda policy: (MetaController.from_policy(policy),))
