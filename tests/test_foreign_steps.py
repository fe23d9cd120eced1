"""Users who step the optimizer themselves: every step is noticed, whatever the optimizer, and statistics go on."""

from __future__ import annotations

import gc
import math
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks

from adaptive_loss import LossExecutor, MetaController
from adaptive_loss.foreign_steps import _watching, watch_steps
from adaptive_loss.meta_controller import RULE


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def parameter() -> nn.Parameter:
    return nn.Parameter(torch.ones(3))


def train(executor: LossExecutor, p: nn.Parameter, optimizer: Optimizer, steps: int, parts: int = 1) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        for _ in range(parts):
            (executor({"a": p.square().sum()}) / parts).backward()
        optimizer.step()


@pytest.mark.parametrize(
    "make",
    [
        lambda p: SGD([p], lr=0.01),
        lambda p: SGD([p], lr=0.01, fused=True),
        lambda p: Adam([p], lr=0.01, foreach=True),
        lambda p: Adam([p], lr=0.01, fused=True),  # leaves the parameters' version counters as they are
        lambda p: SGD([p], lr=0.0),
    ],
)
@pytest.mark.parametrize("parts", [1, 3])
def test_each_step_counts_once(make: Callable[[nn.Parameter], Optimizer], parts: int) -> None:
    executor, p = LossExecutor({"a": 1.0}), parameter()
    train(executor, p, make(p), 5, parts)
    assert executor.signals.step == executor.history.steps == 5


def test_steps_of_both_kinds_count() -> None:
    executor, p = LossExecutor({"a": 1.0}), parameter()
    optimizer = SGD([p], lr=0.01)
    executor({"a": p.square().sum()}).backward()
    assert executor.step(optimizer).applied
    train(executor, p, optimizer, 4)
    assert executor.signals.step == 5


def test_the_state_saved_between_steps_is_complete() -> None:
    executor, p = LossExecutor({"a": 1.0}), parameter()
    train(executor, p, SGD([p], lr=0.01), 3)
    assert executor.state_dict()["_extra_state"]["signals"]["step"] == 3


def test_losses_that_are_never_finite_raise_and_one_that_is_not_skips() -> None:
    executor, p = LossExecutor({"a": 1.0}), parameter()
    optimizer = Adam([p], lr=0.01, fused=True)
    train(executor, p, optimizer, 2)
    optimizer.zero_grad()
    executor({"a": p.sum() * math.nan}).backward()
    optimizer.step()
    train(executor, p, optimizer, 2)
    assert executor.signals.step == 4 and executor.skipped_steps == 1 and executor.rejected_in_row == 0
    with pytest.raises(RuntimeError, match=r"10 steps in a row.*term 'a'"):
        for _ in range(10):
            optimizer.zero_grad()
            executor({"a": p.sum() * math.nan}).backward()
            optimizer.step()


def test_a_gan_of_two_executors_keeps_its_steps_apart() -> None:
    g, d = parameter(), parameter()
    makes, tells = LossExecutor({"fool": 1.0}), LossExecutor({"real": 1.0, "fake": 1.0})
    moves_g, moves_d = SGD([g], lr=0.01), SGD([d], lr=0.01)
    for _ in range(4):
        moves_d.zero_grad()
        tells({"real": d.square().sum(), "fake": (g.detach() * d).sum() + 9}).backward()
        moves_d.step()
        moves_g.zero_grad()
        makes({"fool": (g * d).square().sum()}).backward()
        moves_g.step()
    assert makes.signals.step == tells.signals.step == 4


def test_another_models_optimizer_ends_no_window() -> None:
    executor, p, other = LossExecutor({"a": 1.0}), parameter(), parameter()
    executor({"a": p.square().sum()}).backward()
    other.grad = torch.ones(3)
    SGD([other], lr=0.1).step()
    assert executor.signals.step == 0
    SGD([p], lr=0.1).step()
    assert executor.signals.step == 1


def test_the_look_ahead_of_such_a_step_uses_the_optimizers_metric() -> None:
    def gains(own: bool) -> torch.Tensor:
        p = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
        executor = LossExecutor(
            {"a": 1.0, "b": 1.0}, base="a", modulators=[MetaController(RULE)], probe=lambda: (p - 1).square().sum()
        )
        optimizer = Adam([p], lr=0.0)  # nothing moves, so before and after the step are one
        for _ in range(6):
            optimizer.zero_grad()
            executor({"a": p.square().sum(), "b": p[0].exp() + p[2]}).backward()
            optimizer.step() if own else executor.step(optimizer)
        assert executor.signals.look_aheads > 0
        return executor.signals.gain

    torch.testing.assert_close(gains(True), gains(False), rtol=1e-5, atol=1e-7)


def test_an_executor_that_is_gone_is_not_called_any_more() -> None:
    gc.collect()
    before = len(_watching)
    executor = LossExecutor({"a": 1.0})
    hooks = len(_global_optimizer_post_hooks)
    assert len(_watching) == before + 1
    others = [LossExecutor({"a": 1.0}) for _ in range(3)]
    assert len(_global_optimizer_post_hooks) == hooks
    del executor, others
    gc.collect()
    assert len(_watching) <= before


def test_an_owner_may_die_while_others_are_told() -> None:
    """PyTorch walked through a hook an owner; the garbage collector took one away, and the user's step failed."""

    class Owner:
        """Somebody who watches, and can only be found dead by the garbage collector."""

        def __init__(self) -> None:
            self.me: Owner | None = self

    p = parameter()
    optimizer, told = SGD([p], lr=0.1), []
    first = Owner()
    watch_steps(first, lambda owner, optimizer: told.append(gc.collect()))
    gc.disable()
    try:
        watch_steps(Owner(), lambda owner, optimizer: None)
        p.grad = torch.ones(3)
        optimizer.step()
    finally:
        gc.enable()
        first.me = None  # it dies here: told of every later test's steps, it would collect at each of them
    assert len(told) == 1
