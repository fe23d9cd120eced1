"""Schedules: weights as a function of the step alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from adaptive_loss.losses import Terms
from adaptive_loss.weighting import weightings
from adaptive_loss.weighting.base import Context, Weighting, ones

Kind = Literal["linear", "sigmoid", "cyclical", "step", "cosine"]
_STEEPNESS = 12.0


def scheduled(
    kind: Kind,
    progress: float,
    *,
    init_value: float = 0.0,
    end_value: float = 1.0,
    cycles: int = 4,
    ramp: float = 0.5,
) -> float:
    """Value of a schedule that runs from ``init_value`` to ``end_value`` as progress p goes from 0 to 1.

    With f = 0 → 1 its shape: linear p; cosine (1 − cos πp)/2; sigmoid 1/(1 + exp(−12(p − ½))), stretched to meet 0
    and 1 (Bowman et al. 2016); step 1 from p = 1 on; cyclical min(1, c/R) with c the part done of the cycle, M cycles
    (Fu et al. 2019).

    Args:
        kind: the shape.
        progress: p; before 0 the value is ``init_value``, from 1 on ``end_value``.
        init_value, end_value: the values at p = 0 and p = 1.
        cycles, ramp: M and R of the cyclical shape.

    Example:
        >>> [scheduled("cyclical", p) for p in (0.0, 0.0625, 0.2, 0.25, 1.0)]
        [0.0, 0.5, 1.0, 0.0, 1.0]
    """
    if progress >= 1:
        return end_value
    return init_value + (end_value - init_value) * _shape(kind, max(progress, 0.0), cycles, ramp)


def _shape(kind: Kind, p: float, cycles: int, ramp: float) -> float:
    if kind == "linear":
        return p
    if kind == "cosine":
        return (1 - math.cos(math.pi * p)) / 2
    if kind == "sigmoid":
        at_0 = _sigmoid(-0.5)
        return (_sigmoid(p - 0.5) - at_0) / (1 - 2 * at_0)
    if kind == "cyclical":
        return min(1.0, (p * cycles % 1.0) / ramp)
    return 0.0


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-_STEEPNESS * x))


@weightings.register("schedule")
class Schedule(Weighting):
    """Moves the chosen terms' weights from one value to another by the step alone: wᵢ = scheduled(kind, p).

    p = (step − begin)/(end − begin) in accepted optimizer steps; kinds are linear, sigmoid, cyclical (0 → 1 over R of
    each of M cycles), step (leaps at ``end``) and cosine. Every other term weighs 1. It multiplies to other rules:
    ``Schedule(2, ...) * GradNorm(2)``.

    Reference: Bowman et al., "Generating Sentences from a Continuous Space", CoNLL 2016 (linear, sigmoid); Fu et al.,
    "Cyclical Annealing Schedule", NAACL 2019 (cyclical); Esser et al., "Taming Transformers", CVPR 2021 (step).

    Choose it when a term must come in late: a KL that would collapse, a discriminator that has nothing to judge yet.
    Metrics it logs: the weights. Deviations: the sigmoid is stretched to reach both its ends; none else.

    Args:
        n_terms: K.
        kind: the shape.
        begin, end: where it starts and ends: an ``int`` is a step, a ``float`` a share of the run, which needs the
            executor's ``total_steps``.
        init_value, end_value: values at begin and end, of at least 0.
        terms: names of the terms it moves; None for all but the base.
        cycles, ramp: M and R.

    Raises:
        ValueError: an unknown kind, an end before its begin, a negative value.
        KeyError: a term the executor does not have.

    Example:
        >>> from adaptive_loss import LossExecutor
        >>> from adaptive_loss.weighting.schedule import Schedule
        >>> import torch
        >>> weighting = Schedule(2, "linear", begin=0, end=4)
        >>> executor = LossExecutor({"rec": 1.0, "kl": 0.5}, base="rec", weighting=weighting)
        >>> p, seen = torch.nn.Parameter(torch.tensor(1.0)), []
        >>> for _ in range(5):
        ...     executor({"rec": p**2, "kl": p**2}).backward()
        ...     seen.append(executor.step(torch.optim.SGD([p], lr=0.0)).weights["kl"])
        >>> seen[1:]
        [0.125, 0.25, 0.375, 0.5]
    """

    family = "schedule"
    needs = ("total steps",)
    jumps = True

    def __init__(
        self,
        n_terms: int,
        kind: Kind = "linear",
        begin: float = 0.0,
        end: float = 1.0,
        init_value: float = 0.0,
        end_value: float = 1.0,
        terms: Sequence[str] | None = None,
        cycles: int = 4,
        ramp: float = 0.5,
    ) -> None:
        super().__init__(n_terms)
        _check(kind, begin, end, (init_value, end_value), cycles, ramp)
        if not any(isinstance(place, float) for place in (begin, end)):
            self.needs = ()
        self.kind: Kind = kind
        self.begin, self.end, self.init_value, self.end_value = begin, end, init_value, end_value
        self.chosen = None if terms is None else tuple(terms)
        self.cycles, self.ramp = cycles, ramp

    def bind(self, terms: Terms, seed: int) -> None:
        """Find the terms it moves."""
        super().bind(terms, seed)
        for name in self.chosen or ():
            if name not in terms.names:
                raise KeyError(f"weighting 'schedule': {name!r} is not a term; they are: {', '.join(terms.names)}")
        moved = [name != terms.base if self.chosen is None else name in self.chosen for name in terms.names]
        self.moved = torch.tensor(moved)

    def unmet(self, context: Context) -> str | None:
        """The run's length, where begin or end is a share of it."""
        if context.signals.total_steps is not None or not self.needs:
            return None
        return (
            "weighting 'schedule' needs total steps: say LossExecutor(..., total_steps=N), "
            "or make it with begin and end in steps, as whole numbers"
        )

    def forward(self, losses: Tensor, context: Context) -> Tensor:
        """[K] the schedule's value for the terms it moves, else 1."""
        length = context.signals.total_steps or 0
        begin, end = (x * length if isinstance(x, float) else x for x in (self.begin, self.end))
        progress = (context.step - begin) / (end - begin) if end > begin else float(context.step >= end)
        value = scheduled(
            self.kind,
            progress,
            init_value=self.init_value,
            end_value=self.end_value,
            cycles=self.cycles,
            ramp=self.ramp,
        )
        return torch.where(self.moved, value, ones(self.n_terms))


def _check(kind: str, begin: float, end: float, values: tuple[float, float], cycles: int, ramp: float) -> None:
    if kind not in get_args(Kind):
        raise ValueError(f"Schedule's kind is {kind!r}: choose from {', '.join(get_args(Kind))}")
    alike = isinstance(begin, float) == isinstance(end, float)
    if not (begin >= 0 and 0 <= end < math.inf) or (alike and end < begin):
        raise ValueError(f"Schedule runs from {begin} to {end}: give 0 ≤ begin ≤ end, steps or shares of the run")
    for place in (begin, end):
        if isinstance(place, float) and place > 1:
            raise ValueError(f"Schedule got {place}, a share of the run: write {place:.0f} as a whole number for steps")
    if not all(0 <= value < math.inf for value in values):
        raise ValueError(f"Schedule's values are {values}: a weight is a finite number of at least 0")
    if cycles < 1 or not 0 < ramp <= 1:
        raise ValueError(f"Schedule got {cycles} cycles and ramp {ramp}: give at least 1 cycle and a ramp in (0, 1]")
