"""The control of the monitor: the same actions at random."""

from __future__ import annotations

from adaptive_loss.loss_monitor import RandomMonitor
from adaptive_loss.meta_controller import MetaController
from adaptive_loss.modes import modes
from adaptive_loss.modes.base import Mode


@modes.register("random_monitor")
def random_monitor() -> Mode:
    """The full system with the monitor's choices replaced by chance."""
    return Mode(lambda policy: (MetaController.from_policy(policy), RandomMonitor(rho=1.0)))
