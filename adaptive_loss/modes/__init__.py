"""Ablation modes, one file each: what moves the weights of a run."""

from adaptive_loss.registry import Registry

modes = Registry("mode", "adaptive_loss.modes", aliases={"full_adaptive": "full"}, not_plugins=("base",))
