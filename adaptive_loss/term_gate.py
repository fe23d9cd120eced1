"""Term gate: looks at each batch's losses before anything else does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from adaptive_loss.events import Event
from adaptive_loss.guards import Guards, first_non_finite
from adaptive_loss.losses import StepLosses, Terms
from adaptive_loss.quarantine import Quarantine
from adaptive_loss.spike_gate import SpikeGate
from adaptive_loss.step_record import Rejection, Window


class TermGate:
    """Names the term that makes a batch unusable, and keeps out those in quarantine.

    Args:
        terms: the K terms.
        guards: what is checked.
        leaves_out: whether quarantine may take a term out at all; shadow mode trains on every term.

    Attributes:
        doubts_gradient: whether a gradient was bad since the last accepted step.
    """

    def __init__(self, terms: Terms, guards: Guards, leaves_out: bool) -> None:
        self.terms, self.guards = terms, guards
        self.spikes = SpikeGate(len(terms.names), guards.spike_window)
        after = guards.quarantine if leaves_out else None
        self.quarantine = None if after is None else Quarantine(terms, after, guards.quarantine_steps)
        self.doubts_gradient = False

    @property
    def left_out(self) -> tuple[str, ...]:
        """The terms in quarantine."""
        return () if self.quarantine is None else self._named(self.quarantine.out)

    def sift(self, batch: StepLosses, window: Window) -> StepLosses:
        """The batch without the terms in quarantine, whose values are only watched; a batch of nothing else stays."""
        if self.quarantine is None:
            return batch
        out = self.quarantine.out & batch.present
        if not out.any() or not (batch.present & self.terms.active & ~out).any():
            return batch
        window.watched = window.watched | out
        spikes = self.spikes.spiking(batch.values) & self.guards.spikes
        window.ill = window.ill | (out & (spikes | ~torch.isfinite(batch.values)))
        return batch.without(out)

    def examine(self, batch: StepLosses, present: Tensor) -> Rejection | None:
        """Why the batch cannot be used, or None; ``present`` is [K] bool, the terms that are there and on."""
        values = batch.values
        bad = first_non_finite(values, present)
        if bad is not None:
            culprits = self._named(present & ~torch.isfinite(values))
            return Rejection(f"the loss is {float(values[bad])}", self.terms.names[bad], "loss", culprits)
        worst = self.spikes.worst(values, present) if self.guards.spikes else None
        if worst is None:
            return None
        value, limit = float(values[worst]), float(self.spikes.limits[worst])
        reason = f"the loss jumped to {value:.6g}, its limit is {limit:.6g} (Guards(spikes=False) lets jumps pass)"
        return Rejection(reason, self.terms.names[worst], "spike", self._named(present & self.spikes.spiking(values)))

    def strike(self, rejection: Rejection, step: int) -> list[Event]:
        """Count a rejection against all terms that are known to be bad."""
        self.doubts_gradient |= rejection.cause == "gradient"
        if self.quarantine is None:
            return []
        culprits = [self.terms.places[name] for name in rejection.culprits]
        return [event for term in culprits for event in self.quarantine.strike(term, rejection.reason, step)]

    def admit(self, values: Tensor, window: Window, step: int) -> list[Event]:
        """Take in an accepted step: its mean losses, [K], NaN where absent, and what was watched."""
        self.doubts_gradient = False
        if self.quarantine is None:
            self.spikes.admit(values)
            return []
        self.spikes.admit(values, self.quarantine.out)
        return self.quarantine.after_step(window.present | window.watched, window.ill, step)

    def last(self) -> dict[str, float]:
        """Name → last accepted value, NaN where there is none."""
        return dict(zip(self.terms.names, self.spikes.last(), strict=True))

    def _named(self, which: Tensor) -> tuple[str, ...]:
        return tuple(name for name, there in zip(self.terms.names, which.tolist(), strict=True) if there)

    def state_dict(self) -> dict[str, Any]:
        """Everything, as tensors and numbers."""
        if self.quarantine is None:
            return {"spikes": self.spikes.state_dict(), "quarantine": None}
        # Whether the next bad gradient is a strike hangs on the doubt; without quarantine it only helps to a name.
        ward = self.quarantine.state_dict() | {"doubts_gradient": self.doubts_gradient}
        return {"spikes": self.spikes.state_dict(), "quarantine": ward}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`; quarantine begins anew where it was off."""
        self.spikes.load_state_dict(state["spikes"])
        if self.quarantine is not None and state["quarantine"] is not None:
            self.quarantine.load_state_dict(state["quarantine"])
            self.doubts_gradient = state["quarantine"]["doubts_gradient"]
