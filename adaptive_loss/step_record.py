"""What one optimizer step leaves behind, and the forward passes that lead up to it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from adaptive_loss.events import Event
from adaptive_loss.gradients import LookAhead
from adaptive_loss.live_look import MeasureLater
from adaptive_loss.losses import StepLosses

Cause = Literal["loss", "spike", "weight", "gradient", "overflow"]
"""What was wrong with a rejected step; an overflow is mixed precision's own search for a scale, and harmless."""


class Named(Mapping[str, float]):
    """Values by name, NaN left out; made a dictionary only when it is read, which of a thousand terms few steps are.

    Args:
        names: K.
        values: [K], which nobody changes any more.

    Example:
        >>> dict(Named(("a", "b"), torch.tensor([1.0, float("nan")])))
        {'a': 1.0}
    """

    def __init__(self, names: Sequence[str], values: Tensor) -> None:
        self._names, self._values = names, values

    @cached_property
    def _dict(self) -> dict[str, float]:
        pairs = zip(self._names, self._values.tolist(), strict=True)
        return {name: value for name, value in pairs if value == value}  # a NaN is not

    def __getitem__(self, name: str) -> float:
        return self._dict[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._dict)

    def __len__(self) -> int:
        return len(self._dict)

    def __repr__(self) -> str:
        return repr(self._dict)


@dataclass(frozen=True)
class StepRecord:
    """What became of one optimizer step.

    Args:
        step: accepted optimizer steps so far, this one included where it was accepted.
        applied: whether the optimizer stepped (in shadow mode it always does).
        reason: why the step was rejected (in shadow mode: would have been), else None.
        term: the term that is to blame, where one is.
        weights: the weights applied, in the user's units; of a rejected step, those applied last.
        losses: the step's losses (means over accumulated batches).
        gradient_norm: Euclidean norm before clipping; NaN where it was not taken.
        events: what was done since the last record, and why.
        cause: what kind of check the step failed, None where it failed none.
    """

    step: int
    applied: bool
    reason: str | None
    term: str | None
    weights: Mapping[str, float]
    losses: Mapping[str, float]
    gradient_norm: float
    events: tuple[Event, ...] = ()
    cause: Cause | None = None


@dataclass(frozen=True)
class Rejection:
    """Why a step is rejected.

    Args:
        reason: in words.
        term: the term that is to blame, where one is.
        cause: which check failed.
        culprits: all terms that are known to be bad, so that without them the step would have been good.
    """

    reason: str
    term: str | None
    cause: Cause
    culprits: tuple[str, ...] = ()


@dataclass
class Window:
    """The forward passes since the last optimizer step: one, or several under gradient accumulation.

    Args:
        before: [K] the weights applied on the last accepted step, which a rejection goes back to.
        total, count: [K] sums and numbers of the batches' losses, by term; NaN and 0 where absent.
        present: [K] bool, the terms that were there and on in some batch.
        watched, ill: [K] bool, the terms in quarantine that were there, and those of them that were bad.
        norms: [K] weighted gradient norms, taken after a step whose gradient was bad; None elsewhere.
        rejection: the first reason to reject, if any.
        look: this step's look-ahead; ``look_later`` makes it once the optimizer is known.
        probe_state: where the probe stood before the look-ahead.
        train: what the look-ahead's objective is compared with.
        batches: accepted forward passes.
        weights: [K] the guarded weights of the first batch, held for the others.
        stages: what each guard made of the weights: its name, the weights before and after.
        leaves: ids of what the batches are differentiable in, noted while the optimizer is not known.
    """

    before: Tensor
    total: Tensor
    count: Tensor
    present: Tensor
    watched: Tensor
    ill: Tensor
    norms: Tensor | None = None
    rejection: Rejection | None = None
    look: LookAhead | None = None
    look_later: MeasureLater | None = None
    probe_state: Mapping[str, Any] | None = None
    train: float = math.nan
    batches: int = 0
    weights: Tensor | None = None
    stages: list[tuple[str, Tensor, Tensor]] = field(default_factory=list)
    leaves: set[int] = field(default_factory=set)

    @classmethod
    def opened(cls, weights: Tensor) -> Window:
        """An empty window after a step that applied ``weights``, [K]."""
        none = torch.zeros(len(weights), dtype=torch.bool)
        return cls(weights, torch.full_like(weights, math.nan), torch.zeros_like(weights), none, none, none)

    def add(self, batch: StepLosses, present: Tensor) -> None:
        """Take in one batch's losses; ``present`` is [K] bool, the terms that are there and on."""
        self.batches += 1
        if self.batches == 1:
            self.present, self.total, self.count = present, batch.values, batch.present
            return
        self.present = self.present | present
        self.total = torch.where(batch.present, torch.where(self.count > 0, self.total, 0.0) + batch.values, self.total)
        self.count = self.count.to(batch.values.dtype) + batch.present

    def means(self) -> Tensor:
        """[K] mean losses, NaN where absent in all batches."""
        return self.total if self.batches <= 1 else self.total / self.count
