"""What moves the weights above their rule: monitor, controller, set-point law."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from adaptive_loss.events import Event
from adaptive_loss.knob import Knob, Law, Limits, Saturation, log_weight, reported, unreached
from adaptive_loss.lookahead import Schedule
from adaptive_loss.losses import Terms
from adaptive_loss.weighting.base import Context

DOMINATES = 0.99
"""Share of Σⱼ wⱼ|Lⱼ| above which a term hides all others."""
FAR = 0.1
"""Part of its target by which such a term must lie below it to hurry; noise alone does not go so far."""
_KEPT = 0.999
"""Part of what the optimizer's memory was not told that counts on the next step; Adam forgets as slowly by itself."""
_TOLD = 0.2
"""Nats by which the gradient's length changes before the optimizer's memory is told, which costs as much as a step."""


class Modulator(ABC):
    """Moves log-weights above the weighting rule; the executor adds up the gains of all modulators.

    Only auxiliaries move (and constraints, under their set-point law); the executor masks the rest.
    """

    schedule: Schedule = Schedule()
    """When it would have the executor look ahead; of several modulators, the first one's counts."""

    def bind(self, terms: Terms, total_steps: int | None, seed: int) -> None:
        """Allocate state for these terms; called once by the executor that owns this modulator.

        Raises:
            ValueError: it belongs to an executor already; two would overwrite each other's state.
        """
        if hasattr(self, "terms"):
            raise ValueError(f"this {type(self).__name__} belongs to another executor: make one for each")
        self.terms = terms
        self.total_steps = total_steps
        self.log_gain = torch.zeros(len(terms.names), dtype=torch.float64)

    @property
    def identity(self) -> str:
        """What it is, in the words by which a saved state knows its owner."""
        return type(self).__name__

    def gains(self) -> Tensor:
        """[K] log-gains in nats, float64, from committed state only."""
        return self.log_gain

    @abstractmethod
    def after_step(self, context: Context) -> list[Event]:
        """Called once an accepted optimizer step, when the signals are up to date."""

    def end_epoch(self, context: Context, metrics: Mapping[str, float]) -> list[Event]:
        """Called at the end of an epoch, where the user says so."""
        return []

    def unreached(self) -> Mapping[str, str]:
        """The terms that no weight brings to their target, each with the reason in one line."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Everything that must survive a restart, as tensors and numbers."""
        return {"log_gain": self.log_gain.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self.log_gain = state["log_gain"].clone()


class SetPoint(Modulator):
    """Holds each constraint's loss at its target τ by an integral law on its log-weight.

    log wᵢ ← log wᵢ + clip(η·log(L̄ᵢ/τᵢ), ±δ) once a step (differences over |τ| where a value is not positive), after
    Rezende & Viola, "Taming VAEs" (2018): the weight rises while the loss is above its target and falls below it. The
    executor's reach bounds the sum, the law does not wind up beyond it, and an alarm sounds where it stays there.

    Where a loss is in large units, its term drowns the rest at first and its weight has many nats to go. So a term that
    is a tenth below its target and holds more than 0.99 of Σⱼ wⱼ|L̄ⱼ| falls at once, η = 1, until it is back at its
    target for the first time; and the optimizer's memory is told
    (:func:`~adaptive_loss.optimizer_memory.rescale_memory`), as it would go on dividing by gradients that are long
    gone. There is no look-ahead at every step, so the gradient's length is guessed to go as Σⱼ wⱼ|L̄ⱼ| does.

    Args:
        rate: η, per step. While a model improves, its weight has to follow: the loss stays off its target by the pace
            at which the weight moves over η, which at 0.02 was 6% of a reconstruction in a run of 700 steps.
        limit: δ, greatest change of a log-weight in one step, in nats.
        reach: greatest distance of the log-weight from its start, in nats.
    """

    def __init__(self, reach: float, *, rate: float = 0.05, limit: float = 0.1) -> None:
        self.limits, self.rate, self.limit = Limits((-reach, reach)), rate, limit
        self.knobs: dict[str, Knob] = {}
        self.alarms: list[Saturation] = []
        self.untold = 0.0

    def bind(self, terms: Terms, total_steps: int | None, seed: int) -> None:
        """Make a knob for every constraint."""
        super().bind(terms, total_steps, seed)
        self.knobs = {name: self._knob(name, target) for name, target in terms.targets.items()}
        self.hurried, self.settled = (torch.zeros(len(terms.names), dtype=torch.bool) for _ in range(2))

    def _knob(self, name: str, target: float) -> Knob:
        return Knob(
            self._law(target),
            target=target,
            value=0.0,
            name=f"the log-weight of {name!r}, from its start",
            limits=self.limits,
            on_alarm=self.alarms.append,
        )

    def _law(self, target: float, hurries: bool = False) -> Law:
        return partial(log_weight, target=target, rate=1.0 if hurries else self.rate, limit=self.limit)

    def after_step(self, context: Context) -> list[Event]:
        """Move every constraint that was there this step."""
        means, before = context.signals.fast, self.log_gain.clone()
        parts = (context.weights * means.abs()).nan_to_num(0.0)
        dominant = parts > DOMINATES * parts.sum()
        for name, knob in self.knobs.items():
            i = self.terms.names.index(name)
            if context.present[i]:
                hurries = self._hurries(i, float(means[i]), knob.target, bool(dominant[i]))
                knob.law = self._law(knob.target, hurries)
                self.log_gain[i] = knob.observe(float(means[i]))
        self._tell_memory(context, parts, self.log_gain - before)
        return reported(self.alarms, context.step)

    def _hurries(self, i: int, mean: float, target: float, dominant: bool) -> bool:
        self.settled[i] |= self.hurried[i] & (mean >= target)
        hurries = dominant and not self.settled[i] and target - mean > FAR * abs(target)
        self.hurried[i] |= hurries
        return hurries

    def _tell_memory(self, context: Context, parts: Tensor, change: Tensor) -> None:
        if context.rescale is None:
            return
        after = parts * change.exp()
        if self.terms.base is None:  # then the weights keep their sum
            after = after * (context.weights.sum() / (context.weights * change.exp()).sum())
        grown = float((after.sum() / parts.sum()).log()) if parts.any() else 0.0
        self.untold = _KEPT * self.untold + (grown if math.isfinite(grown) else 0.0)
        if abs(self.untold) > _TOLD:
            context.rescale(math.exp(self.untold))
            self.untold = 0.0

    def unreached(self) -> Mapping[str, str]:
        """The constraints whose knobs stand at a bound."""
        return unreached(self.knobs)

    def state_dict(self) -> dict[str, Any]:
        """Gains, knobs, who has hurried and settled, and what the optimizer's memory has not been told yet."""
        knobs = {name: knob.state_dict() for name, knob in self.knobs.items()}
        hurry = {"hurried": self.hurried.clone(), "settled": self.settled.clone()}
        return {**super().state_dict(), **hurry, "knobs": knobs, "untold": self.untold}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        super().load_state_dict(state)
        self.hurried, self.settled = (state[name].clone() for name in ("hurried", "settled"))
        self.untold = state["untold"]
        for name, knob in self.knobs.items():
            knob.load_state_dict(state["knobs"][name])
