"""Doorway to :mod:`adaptive_loss.utils.performance`."""

from adaptive_loss.utils.performance import *  # noqa: F403
