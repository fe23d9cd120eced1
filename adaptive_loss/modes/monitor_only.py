"""The Loss Monitor Agent alone."""

from __future__ import annotations

from adaptive_loss.loss_monitor import LossMonitor
from adaptive_loss.modes import modes
from adaptive_loss.modes.base import Mode


@modes.register("monitor_only")
def monitor_only() -> Mode:
    """The monitor at full strength (ρ = 1), learning on from its policy's networks as it goes."""
    return Mode(lambda policy: (LossMonitor.from_policy(policy, rho=1.0, online=True),))
