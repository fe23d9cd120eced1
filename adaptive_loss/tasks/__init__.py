"""Tasks, one file each: the terms, the model, the data, the objective and the metrics of one kind of training."""

from adaptive_loss.registry import Registry

tasks = Registry("task", "adaptive_loss.tasks", not_plugins=("base",))
