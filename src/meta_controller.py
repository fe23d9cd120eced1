"""Doorway to :mod:`adaptive_loss.meta_controller`."""

from adaptive_loss.meta_controller import *  # noqa: F403
