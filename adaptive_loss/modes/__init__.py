"""Ablation modes, one file each: which modulators a run's executor gets, and nothing else."""

from adaptive_loss.registry import Registry

modes = Registry("mode", "adaptive_loss.modes", aliases={"full_adaptive": "full"}, not_plugins=("base",))
