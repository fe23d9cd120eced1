"""Doorway to :mod:`adaptive_loss.data.cifar10_loader`."""

from adaptive_loss.data.cifar10_loader import *  # noqa: F403
