"""Quarantine: an auxiliary that is bad again and again is left out, so that the run goes on on the other terms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from adaptive_loss.events import Event
from adaptive_loss.losses import Terms


class Quarantine:
    """Who is left out, and when they come back.

    A rejected step is a strike against the term it names. At ``after`` strikes the term is left out: it counts as
    absent, and only its values are watched. After ``steps`` healthy steps in a row it is back on probation, where one
    strike is enough; strikes are forgotten after as many healthy steps. Only auxiliaries are left out, and never the
    last term that is on.

    Args:
        terms: the K terms.
        after: strikes.
        steps: healthy optimizer steps in a row.

    Example:
        >>> ward = Quarantine(Terms({"fit": 1.0, "aux": 1.0}, base="fit"), after=2, steps=10)
        >>> [len(ward.strike(1, "the loss is nan", step)) for step in (0, 1)], ward.out.tolist()
        ([0, 1], [False, True])
    """

    def __init__(self, terms: Terms, after: int, steps: int) -> None:
        self.terms, self.after, self.steps = terms, after, steps
        none = torch.zeros(len(terms.names), dtype=torch.int64)
        self.out = none.bool()
        self.strikes, self.calm = none, none.clone()

    def strike(self, term: int, reason: str, step: int) -> list[Event]:
        """Count a rejected step against a term; the event where that takes it out."""
        alone = int((self.terms.active & ~self.out).sum()) == 1
        if self.out[term] or not self.terms.movable[term] or alone:
            return []
        self.strikes[term] += 1
        self.calm[term] = 0
        if self.strikes[term] < self.after:
            return []
        self.out[term] = True
        # What is left on return is probation: one more is enough.
        self.strikes[term] = self.after - 1
        name = self.terms.names[term]
        why = f"{name!r} is left out, bad again and again, the last time because {reason}"
        return [Event(step, "quarantine", why, {"term": name, "out": True})]

    def after_step(self, present: Tensor, ill: Tensor, step: int) -> list[Event]:
        """Take in an accepted step; the events of those who come back.

        Args:
            present: [K] bool, the terms that were there, whether left out or not.
            ill: [K] bool, those among them that would have been rejected.
            step: accepted steps, this one included.
        """
        self.calm = torch.where(ill, 0, self.calm + present)
        healed = self.calm >= self.steps
        back = self.out & healed
        self.strikes = torch.where(healed & ~back, 0, self.strikes)
        self.calm = torch.where(healed, 0, self.calm)
        self.out = self.out & ~back
        named = zip(self.terms.names, back.tolist(), strict=True)
        return [self._returns(name, step) for name, returns in named if returns]

    def _returns(self, name: str, step: int) -> Event:
        why = f"{name!r} is back on probation after {self.steps} healthy steps"
        return Event(step, "quarantine", why, {"term": name, "out": False})

    def state_dict(self) -> dict[str, Any]:
        """Everything, as tensors."""
        return {name: getattr(self, name).clone() for name in ("out", "strikes", "calm")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        for name in ("out", "strikes", "calm"):
            setattr(self, name, state[name].clone())
