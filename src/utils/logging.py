"""Doorway to :mod:`adaptive_loss.utils.logging`."""

from adaptive_loss.utils.logging import *  # noqa: F403
