"""The weights found: what a run applied, kept small however long the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_KEEP = 1024


class WeightHistory:
    """Final weights, their mean over the run, and a schedule of at most about 1,000 points.

    When the schedule is full, every second point goes and the distance between points doubles.

    Example:
        >>> history = WeightHistory(("a",))
        >>> history.add(1, torch.tensor([2.0]))
        >>> history.export()["mean"]
        {'a': 2.0}
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.steps = 0
        self.total = torch.zeros(len(names), dtype=torch.float64)
        self.stride = 1
        self.points: list[list[float]] = []

    def add(self, step: int, weights: Tensor) -> None:
        """Note the weights applied on an accepted step."""
        if self.steps % self.stride == 0:
            self.points.append([float(step), *weights.tolist()])
        self.steps += 1
        self.total += weights
        if len(self.points) >= _KEEP:
            self.points = self.points[::2]
            self.stride *= 2

    def export(self) -> dict[str, Any]:
        """``final`` and ``mean`` as name → weight, ``schedule`` as a list of {"step": …, name: weight, …}."""
        schedule = [dict(zip(("step", *self.names), point, strict=True)) for point in self.points]
        mean = (self.total / max(self.steps, 1)).tolist()
        return {"mean": dict(zip(self.names, mean, strict=True)), "schedule": schedule}

    def state_dict(self) -> dict[str, Any]:
        """Everything, as tensors and numbers."""
        points = torch.tensor(self.points, dtype=torch.float64).reshape(len(self.points), len(self.names) + 1)
        return {"steps": self.steps, "total": self.total.clone(), "stride": self.stride, "points": points}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self.steps, self.stride = state["steps"], state["stride"]
        self.total, self.points = state["total"].clone(), state["points"].tolist()
