"""Rollback: a run that has gone bad goes back to where it was good, a few times, before it gives up."""

from __future__ import annotations

import copy
import math
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from adaptive_loss.diagnosis import diagnosis
from adaptive_loss.events import Event
from adaptive_loss.live_look import moved
from adaptive_loss.loss_executor import LossExecutor
from adaptive_loss.step_record import Rejection, StepRecord


class Stateful(Protocol):
    """Whatever can be saved and loaded: a model, a scheduler, a GradScaler, an average of weights."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state_dict: Any, /) -> Any: ...


class Rollback:
    """Goes back to a snapshot in host memory when steps are rejected again and again.

    Everything it was given is then bit for bit as it was; random generators and the order of the data go on, so that
    the same batches do not come again. A snapshot counts once a step after it has been accepted, since the step before
    it may be the one that did the harm, and none is taken of parameters that are not finite. Rejections that are mixed
    precision's search for a scale do not count.

    Args:
        executor: says what became of each step.
        optimizer: the one that the executor steps.
        parts: what else moves: the model, and a scheduler, scaler or average where there is one.
        every: accepted steps between snapshots.
        after: rejected steps in a row that are too many.
        retries: times to go back without reaching another snapshot; the next time it gives up.

    Raises:
        ValueError: numbers that cannot be.

    Example:
        >>> model, executor = torch.nn.Linear(1, 1), LossExecutor({"fit": 1.0})
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> rollback = Rollback(executor, optimizer, model)
        >>> executor({"fit": model(torch.ones(1, 1)).square().sum()}).backward()
        >>> rollback.watch(executor.step(optimizer))
        False
    """

    def __init__(
        self,
        executor: LossExecutor,
        optimizer: Optimizer,
        *parts: Stateful,
        every: int = 100,
        after: int = 5,
        retries: int = 3,
    ) -> None:
        _check(every, after, retries, executor.guards.max_rejections)
        self.executor, self.optimizer = executor, optimizer
        self.parts: tuple[Stateful, ...] = (*parts, optimizer, executor)
        self.every, self.after, self.retries = every, after, retries
        self.tried = self._bad = self._since = 0
        self._good: dict[str, float] = dict.fromkeys(executor.terms.names, math.nan)
        self._snapshot, self._pending = self._taken(), None

    def watch(self, record: StepRecord) -> bool:
        """Take note of a step; True where it was one too many and all is as it was at the snapshot.

        Args:
            record: what ``executor.step(...)`` returned.

        Raises:
            RuntimeError: it has gone back ``retries`` times; all is as it was at the snapshot, and the message says
                which term, at which step, what was good last and what to try.
        """
        if record.reason is None:
            self._note(record)
        elif not record.applied and record.cause != "overflow":
            self._bad += 1
        if self._bad < self.after:
            return False
        self._go_back(record)
        return True

    def _note(self, record: StepRecord) -> None:
        """An accepted step: it vouches for a snapshot under way, and may be followed by another."""
        self._bad = 0
        self._good |= record.losses
        if self._pending is not None:
            self._snapshot, self._pending, self.tried = self._pending, None, 0
        self._since += 1
        if self._since >= self.every and all(bool(torch.isfinite(p).all()) for p in moved(self.optimizer)):
            self._pending, self._since = self._taken(), 0

    def _go_back(self, record: StepRecord) -> None:
        for part, state in zip(self.parts, self._snapshot, strict=True):
            # An optimizer goes on in the very tensors that it is given.
            part.load_state_dict(_copied(state))
        self._bad, self._since, self._pending = 0, 0, None
        assert record.reason is not None and record.cause is not None
        rejection = Rejection(record.reason, record.term, record.cause)
        why, back = diagnosis(rejection, record.step, self._good), self.executor.signals.step
        if self.tried == self.retries:
            raise RuntimeError(
                f"went back to step {back} (at most {self.retries} times) and failed again, because of {why}; "
                f"all is as it was at step {back}"
            )
        self.tried += 1
        details = {"term": record.term, "before": record.step, "after": back, "retry": self.tried}
        self.executor.report(Event(back, "rollback", f"{self.after} rejected steps in a row, {why}", details))

    def _taken(self) -> list[Any]:
        return [_copied(part.state_dict()) for part in self.parts]


def _check(every: int, after: int, retries: int, most: int) -> None:
    if every < 1 or retries < 0:
        raise ValueError(f"Rollback(every={every}, retries={retries}): give every >= 1 and retries >= 0")
    if not 1 <= after < most:
        raise ValueError(
            f"Rollback(after={after}): give at least 1 and less than Guards.max_rejections, which is {most}: there the "
            "executor gives up"
        )


def _copied(value: Any) -> Any:
    """A copy of a state that shares no memory with it, tensors in host memory."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        fresh = copy.copy(value)  # of its own kind: a module's state carries its version beside its entries
        fresh.update((name, _copied(part)) for name, part in value.items())
        return fresh
    if type(value) in (list, tuple):
        return type(value)(map(_copied, value))
    return copy.deepcopy(value)
