"""Doorway to :mod:`adaptive_loss.loss_executor`."""

from adaptive_loss.loss_executor import *  # noqa: F403
