"""Weighting rules, one file each: ``weightings.get(name)`` gives a :class:`~adaptive_loss.weighting.base.Weighting`."""

from adaptive_loss.registry import Registry

weightings = Registry("weighting", "adaptive_loss.weighting", not_plugins=("base", "compose"))
