"""The whole system."""

from __future__ import annotations

from adaptive_loss.loss_monitor import LossMonitor
from adaptive_loss.meta_controller import MetaController
from adaptive_loss.modes import modes
from adaptive_loss.modes.base import Mode


@modes.register("full")
def full() -> Mode:
    """Controller and, on top of it, the monitor at full strength (ρ = 1), learning on from its policy's networks."""
    return Mode(
        lambda policy: (MetaController.from_policy(policy), LossMonitor.from_policy(policy, rho=1.0, online=True))
    )
