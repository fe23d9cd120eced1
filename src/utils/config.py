"""Doorway to :mod:`adaptive_loss.utils.config`."""

from adaptive_loss.utils.config import *  # noqa: F403
