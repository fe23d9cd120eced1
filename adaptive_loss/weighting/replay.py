"""The weights of another run, played back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from adaptive_loss.losses import Terms
from adaptive_loss.weighting import weightings
from adaptive_loss.weighting.base import Context, Weighting

STEP = "step"
Points = Sequence[Mapping[str, float]]
"""What ``executor.export()["schedule"]`` is: {"step": …, name: weight, …}, the steps rising."""


def point_at(steps: Tensor, step: int) -> int:
    """Index of the last point whose step is not after ``step``, 0 before the first; ``steps`` are [P] and rise.

    Example:
        >>> [point_at(torch.tensor([1, 5, 9]), step) for step in (0, 4, 5, 100)]
        [0, 0, 1, 2]
    """
    return max(int(torch.searchsorted(steps, step, right=True)) - 1, 0)


@weightings.register("replay")
class Replay(Weighting):
    """Plays a finished run's weights back by the step alone, whatever the losses do now.

    wᵢ = W(t)ᵢ/startᵢ, so that what is applied at step t is W(t)ᵢ, with W(t) the last point of the schedule at or before
    step t. A schedule of a run of more than about a thousand steps holds every second, fourth, … step only; between two
    points the earlier one stands.

    Choose it when you ask what adapting was worth: the run that adapted, its weights' mean held fixed, and its schedule
    played back differ only in what answers to the losses. Metrics it logs: the weights. Deviations: the start weights
    do not multiply, they say which terms are on.

    Args:
        n_terms: K.
        schedule: ``executor.export()["schedule"]`` of the run.

    Raises:
        ValueError: no point, steps that do not rise, a weight that is negative or not finite, or points with other
            than the K same names.
        KeyError: at the executor's construction, a term that the schedule does not have.

    Example:
        >>> import torch
        >>> from adaptive_loss import LossExecutor
        >>> from adaptive_loss.weighting.replay import Replay
        >>> points = [{"step": 1, "rec": 1.0, "kl": 0.1}, {"step": 3, "rec": 1.0, "kl": 0.4}]
        >>> executor = LossExecutor({"rec": 1.0, "kl": 2.0}, base="rec", weighting=Replay(2, points))
        >>> w, seen = torch.nn.Parameter(torch.tensor(1.0)), []
        >>> for _ in range(4):
        ...     executor({"rec": w**2, "kl": w**2}).backward()
        ...     seen.append(executor.step(torch.optim.SGD([w], lr=0.0)).weights["kl"])
        >>> seen
        [0.1, 0.1, 0.4, 0.4]
    """

    family = "schedule"
    needs = ("a schedule",)
    jumps = True
    steps: Tensor
    points: Tensor

    def __init__(self, n_terms: int, schedule: Points = ()) -> None:
        super().__init__(n_terms)
        _check(schedule, n_terms)
        self.names = tuple(name for name in schedule[0] if name != STEP) if schedule else ()
        rows = [[float(point[name]) for name in self.names] for point in schedule]
        self.register_buffer("steps", torch.tensor([int(point[STEP]) for point in schedule], dtype=torch.int64))
        self.register_buffer("points", torch.tensor(rows, dtype=torch.float64).reshape(len(rows), len(self.names)))

    def bind(self, terms: Terms, seed: int) -> None:
        """Find the terms in the schedule."""
        super().bind(terms, seed)
        missing = [name for name in terms.names if name not in self.names]
        if self.names and missing:
            raise KeyError(f"weighting 'replay': its schedule has no {missing[0]!r}, only {', '.join(self.names)}")
        self.order = [self.names.index(name) for name in terms.names] if self.names else []

    def unmet(self, context: Context) -> str | None:
        """The schedule, where it was made without."""
        how = "make it with Replay(n_terms, executor.export()['schedule'])"
        return None if self.names else f"weighting 'replay' needs a schedule: {how}"

    def forward(self, losses: Tensor, context: Context) -> Tensor:
        """[K] the schedule's weights over the start weights; 1 for a term that is off."""
        wanted = self.points[point_at(self.steps, context.step + 1)][self.order]  # the step that is now being made
        return torch.where(context.start > 0, wanted / context.start, 1.0)


def _check(schedule: Points, n_terms: int) -> None:
    for before, point in zip([None, *schedule], schedule, strict=False):
        if STEP not in point or len(point) != n_terms + 1 or set(point) != set(schedule[0]):
            raise ValueError(f"Replay got the point {dict(point)}: give 'step' and the same {n_terms} terms in each")
        if before is not None and not before[STEP] < point[STEP]:
            raise ValueError(f"Replay's schedule has step {point[STEP]} after {before[STEP]}: give steps that rise")
        if not all(math.isfinite(value) and value >= 0 for value in point.values()):
            raise ValueError(f"Replay got the point {dict(point)}: a weight is a finite number of at least 0")
