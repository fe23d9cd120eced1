"""What ships."""

from __future__ import annotations

from adaptive_loss.loss_monitor import LossMonitor
from adaptive_loss.meta_controller import MetaController
from adaptive_loss.modes import modes
from adaptive_loss.modes.base import Mode


@modes.register("adaptive")
def adaptive() -> Mode:
    """As ``LossExecutor.adaptive``: the controller, and the monitor as far as the evidence on its card allows.

    Where the task has a rule for one loss in buckets (``Task.bucket_rule``), it is that rule, or the one named, alone.
    """
    return Mode(lambda policy: (MetaController.from_policy(policy), LossMonitor.from_policy(policy)), by_bucket=True)
