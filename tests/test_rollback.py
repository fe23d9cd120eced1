"""Rollback: back to the snapshot bit for bit, a few times, and then a diagnosis."""

from __future__ import annotations

import copy
import math
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_executor import batch, model, quiet, same, terms
from torch import Tensor

from adaptive_loss import Guards, LossExecutor, Rollback

FIT, NAN = {"fit": 1.0, "small": 0.3, "sharp": 0.7}, math.nan


class Training:
    """A small regression under a rollback."""

    def __init__(self, *, optimizer: Any = torch.optim.Adam, apply: bool = True, **kwargs: int) -> None:
        self.net, self.executor = model(), LossExecutor(FIT, weighting="dwa", apply=apply)
        self.optimizer = optimizer(self.net.parameters(), lr=0.01)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 2, 0.9)
        self.rollback = Rollback(self.executor, self.optimizer, self.net, self.scheduler, **kwargs)
        self.batches = 0

    def step(self, factor: float = 1.0) -> bool:
        losses = terms(self.net, batch(self.batches))
        self.batches += 1
        losses["small"] = losses["small"] * factor
        self.optimizer.zero_grad()
        self.executor(losses).backward()
        record = self.executor.step(self.optimizer)
        if record.applied:
            self.scheduler.step()
        return self.rollback.watch(record)

    def state(self) -> Any:
        parts = (self.net, self.executor, self.optimizer, self.scheduler)
        return copy.deepcopy([dict(part.state_dict()) for part in parts])


def test_after_too_many_rejections_all_is_as_it_was_at_the_snapshot() -> None:
    training = Training(every=4, after=3)
    for _ in range(4):
        training.step()
    wanted = training.state()
    for _ in range(2):
        training.step()
    assert [training.step(NAN) for _ in range(3)] == [False, False, True]
    assert same(wanted, training.state()) and training.executor.signals.step == 4
    events = [event for event in training.executor.drain_events() if event.kind == "rollback"]
    assert [dict(event.details) for event in events] == [{"term": "small", "before": 6, "after": 4, "retry": 1}]
    assert events[0].reason.startswith("3 rejected steps in a row, term 'small': the loss is nan at step 6; last good")


def test_good_steps_in_between_start_the_count_anew() -> None:
    training = Training(every=100, after=2)
    assert not any(training.step(factor) for factor in (1.0, NAN, 1.0, NAN, 1.0))
    assert [training.step(NAN), training.step(NAN)] == [False, True]
    assert training.executor.signals.step == 0  # there is a snapshot from the start


def test_a_snapshot_counts_once_the_step_after_it_was_accepted() -> None:
    training = Training(every=4, after=1)
    for _ in range(8):
        training.step()
    assert training.step(NAN)  # the snapshot of step 8 may hold the harm; the one of step 4 is known to be good
    assert training.executor.signals.step == 4


def test_no_snapshot_is_taken_of_parameters_that_are_not_finite() -> None:
    training = Training(every=1, after=2, optimizer=torch.optim.SGD)
    for _ in range(3):
        training.step()
    for group in training.optimizer.param_groups:
        group["lr"] = 3e38
    training.step(1e3)
    assert not all(bool(torch.isfinite(p).all()) for p in training.net.parameters())
    while not training.step():
        pass
    assert all(bool(torch.isfinite(p).all()) for p in training.net.parameters())


def test_three_retries_and_then_the_diagnosis() -> None:
    training = Training(every=5, after=2)
    for _ in range(6):
        training.step()
    returned = []
    with pytest.raises(RuntimeError) as caught:
        for _ in range(20):
            returned.append(training.step(NAN))
    assert returned == [False, True] * 3 + [False]
    told = str(caught.value)
    assert told.startswith(
        "went back to step 5 (at most 3 times) and failed again, because of term 'small': the loss is"
    )
    assert re.search(r"nan at step 5; last good values: fit \d.*; try: look at what goes into term 'small'", told)
    assert "\n" not in told and training.executor.signals.step == 5
    assert training.step(NAN) is False and training.rollback.tried == 3  # who catches it and goes on is told again


def test_another_snapshot_makes_the_retries_fresh() -> None:
    training = Training(every=3, after=1, retries=1)
    for _ in range(5):
        for _ in range(5):
            assert not training.step()
        assert training.step(NAN)
    with pytest.raises(RuntimeError, match=r"went back to step 15 \(at most 1 times\)"):
        training.step(NAN)


def test_an_overflow_is_the_scaler_s_business() -> None:
    net, executor = model(), LossExecutor(FIT)
    optimizer, scaler = torch.optim.SGD(net.parameters(), lr=0.01), torch.amp.GradScaler("cpu", init_scale=2.0**20)
    rollback = Rollback(executor, optimizer, net, scaler, after=1)
    for _ in range(3):
        optimizer.zero_grad()
        scaler.scale(executor(terms(net, batch(0)))).backward()
        next(net.parameters()).grad[0, 0] = math.inf  # type: ignore[index]
        record = executor.step(optimizer, scaler=scaler)
        assert record.cause == "overflow" and not rollback.watch(record)
    assert scaler.get_scale() == 2.0**17


def test_in_shadow_mode_it_takes_nothing_back() -> None:
    training = Training(apply=False, after=1)
    assert not any(training.step(1e30 if i == 40 else 1.0) for i in range(45))
    assert training.executor.signals.step == 44  # the jump was seen


def test_a_step_without_a_loss_is_neither_good_nor_bad() -> None:
    training = Training(every=1, after=2)
    training.step(NAN)
    assert not training.rollback.watch(training.executor.step(training.optimizer))
    assert training.step(NAN)


@pytest.mark.parametrize("kwargs", [{"every": 0}, {"retries": -1}, {"after": 0}, {"after": 10}])
def test_bad_settings(kwargs: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"Rollback\(.*" + "{}={}".format(*next(iter(kwargs.items())))):
        Training(**kwargs)
    strict = LossExecutor(FIT, guards=Guards(max_rejections=3))
    with pytest.raises(ValueError, match="max_rejections, which is 3"):
        Rollback(strict, torch.optim.SGD([torch.ones(1, requires_grad=True)]), after=3)


def test_whatever_can_be_saved_goes_along() -> None:
    class Ball:
        """An average kept by hand, in containers of all kinds."""

        def __init__(self) -> None:
            self.held: Any = {"mean": torch.zeros(2), "past": [torch.ones(1), (torch.ones(1), 3)], "name": {1, 2}}

        def state_dict(self) -> Any:
            return self.held

        def load_state_dict(self, state: Any) -> None:
            self.held = state

    training, ball = Training(), Ball()
    executor = quiet(FIT)
    rollback = Rollback(executor, training.optimizer, training.net, ball, after=1)
    wanted = copy.deepcopy(ball.held)
    for _ in range(2):
        ball.held["mean"] += 1
        ball.held["past"][1][0].mul_(7)
        ball.held["name"].add(3)
        executor(terms(training.net, batch(0)) | {"fit": training.net(batch(0)).sum() * NAN}).backward()
        assert rollback.watch(executor.step(training.optimizer))
        assert same(wanted, ball.held)


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.booleans(), min_size=1, max_size=40),
    st.integers(1, 5),
    st.integers(1, 4),
)
def test_every_return_finds_what_was_kept(faults: list[bool], every: int, after: int) -> None:
    training = Training(every=every, after=after, retries=100)
    kept = {0: training.state()}
    bad = 0
    for fault in faults:
        bad = bad + 1 if fault else 0
        before = training.executor.signals.step
        assert training.step(NAN if fault else 1.0) is (bad == after)
        step = training.executor.signals.step
        if bad == after:
            bad = 0
            assert same(kept[step], training.state()) and before - step <= 2 * every
        elif not fault:
            kept[step] = training.state()
    assert all(isinstance(p, Tensor) and bool(torch.isfinite(p).all()) for p in training.net.parameters())
