"""Families of small training runs, one file each; see :mod:`adaptive_loss.meta.families.base`."""

from adaptive_loss.registry import Registry

families = Registry("family", "adaptive_loss.meta.families", not_plugins=("base",))
"""Every family by its file's name."""
