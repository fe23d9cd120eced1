"""The whole system."""

from __future__ import annotations

from adaptive_loss.loss_monitor import LossMonitor
from adaptive_loss.meta_controller import MetaController
from adaptive_loss.modes import modes
from adaptive_loss.modes.base import Mode


@modes.register("full")
def full() -> Mode:
    """Controller and, on top of it, the policy's monitor at full strength (ρ = 1), its trained networks frozen."""
    return Mode(lambda policy: (MetaController.from_policy(policy), LossMonitor.from_policy(policy, rho=1.0)))
