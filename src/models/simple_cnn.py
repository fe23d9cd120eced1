"""Doorway to :mod:`adaptive_loss.models.simple_cnn`."""

from adaptive_loss.models.simple_cnn import *  # noqa: F403
