"""What moves the weights above their rule: monitor, controller, set-point law."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from adaptive_loss.events import Event
from adaptive_loss.knob import Knob, Limits, Saturation, log_weight, reported, unreached
from adaptive_loss.lookahead import Schedule
from adaptive_loss.losses import Terms
from adaptive_loss.weighting.base import Context


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

    def bind(self, terms: Terms, total_steps: int | None, seed: int) -> None:
        """Make a knob for every constraint."""
        super().bind(terms, total_steps, seed)
        self.knobs = {name: self._knob(name, target) for name, target in terms.targets.items()}

    def _knob(self, name: str, target: float) -> Knob:
        return Knob(
            partial(log_weight, target=target, rate=self.rate, limit=self.limit),
            target=target,
            value=0.0,
            name=f"the log-weight of {name!r}, from its start",
            limits=self.limits,
            on_alarm=self.alarms.append,
        )

    def after_step(self, context: Context) -> list[Event]:
        """Move every constraint that was there this step."""
        means = context.signals.fast
        for name, knob in self.knobs.items():
            i = self.terms.names.index(name)
            if context.present[i]:
                self.log_gain[i] = knob.observe(float(means[i]))
        return reported(self.alarms, context.step)

    def unreached(self) -> Mapping[str, str]:
        """The constraints whose knobs stand at a bound."""
        return unreached(self.knobs)

    def state_dict(self) -> dict[str, Any]:
        """Gains and knobs."""
        return {**super().state_dict(), "knobs": {name: knob.state_dict() for name, knob in self.knobs.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        super().load_state_dict(state)
        for name, knob in self.knobs.items():
            knob.load_state_dict(state["knobs"][name])
