"""What moves the weights above their rule: monitor, controller, set-point law."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from adaptive_loss.events import Event
from adaptive_loss.losses import Terms
from adaptive_loss.weighting.base import Context


class Modulator(ABC):
    """Moves log-weights above the weighting rule; the executor adds up the gains of all modulators.

    Only auxiliaries move (and constraints, under their set-point law); the executor masks the rest.
    """

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

    def gains(self) -> Tensor:
        """[K] log-gains in nats, float64, from committed state only."""
        return self.log_gain

    @abstractmethod
    def after_step(self, context: Context) -> list[Event]:
        """Called once an accepted optimizer step, when the signals are up to date."""

    def end_epoch(self, context: Context, metrics: Mapping[str, float]) -> list[Event]:
        """Called at the end of an epoch, where the user says so."""
        return []

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
    executor's reach bounds the sum, and the law does not wind up beyond it.

    Args:
        rate: η, per step.
        limit: δ, greatest change of a log-weight in one step, in nats.
        reach: greatest distance of the log-weight from its start, in nats.
    """

    def __init__(self, reach: float, *, rate: float = 0.02, limit: float = 0.1) -> None:
        self.reach, self.rate, self.limit = reach, rate, limit

    def after_step(self, context: Context) -> list[Event]:
        """Move every constraint that was there this step."""
        means = context.signals.fast.mean
        for name, target in self.terms.targets.items():
            i = self.terms.names.index(name)
            if context.present[i]:
                error = _relative_error(float(means[i]), target)
                moved = float(self.log_gain[i]) + max(-self.limit, min(self.limit, self.rate * error))
                self.log_gain[i] = max(-self.reach, min(self.reach, moved))
        return []


def _relative_error(value: float, target: float) -> float:
    if value > 0 and target > 0:
        return math.log(value / target)
    return (value - target) / max(abs(target), 1e-12)
