"""Models, one file each."""

from adaptive_loss.registry import Registry

models = Registry("model", "adaptive_loss.models")
