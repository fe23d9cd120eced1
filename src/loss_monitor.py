"""Doorway to :mod:`adaptive_loss.loss_monitor`."""

from adaptive_loss.loss_monitor import *  # noqa: F403
