"""An optimizer's memory of the gradients' size, brought along when the loss changes its scale."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, NAdam, Optimizer, RMSprop

from adaptive_loss import LossExecutor, MetaController
from adaptive_loss.meta_controller import CLIMB, RULE
from adaptive_loss.optimizer_memory import rescale_memory

Make = Callable[[list[nn.Parameter]], Optimizer]
INVARIANT: dict[str, Make] = {
    "Adam": partial(Adam, lr=1e-2, eps=1e-30),
    "AdamW": partial(AdamW, lr=1e-2, eps=1e-30, weight_decay=0.1),
    "amsgrad": partial(Adam, lr=1e-2, eps=1e-30, amsgrad=True),
    "NAdam": partial(NAdam, lr=1e-2, eps=1e-30),
    "RMSprop": partial(RMSprop, lr=1e-2, eps=1e-30, momentum=0.9),
    "Adagrad": partial(Adagrad, lr=1e-2, eps=1e-30),
}


def descend(make: Make, factors: list[float], memory: bool) -> Tensor:
    """Parameters after a step a factor, the loss multiplied by it; with ``memory`` brought along between steps."""
    dice = torch.Generator().manual_seed(0)
    w = nn.Parameter(torch.randn(5, generator=dice, dtype=torch.float64))
    optimizer, last = make([w]), factors[0]
    for factor in factors:
        if memory:
            rescale_memory(optimizer, [w], factor / last)
        last = factor
        optimizer.zero_grad()
        (factor * (w * torch.randn(5, generator=dice, dtype=torch.float64) - 1).square().sum()).backward()
        optimizer.step()
    return w.detach()


@pytest.mark.parametrize("name", INVARIANT)
def test_a_scale_that_changes_then_changes_nothing(name: str) -> None:
    plain = descend(INVARIANT[name], [1.0] * 12, memory=False)
    changing = [100.0] * 4 + [1.0] * 4 + [0.01] * 4
    torch.testing.assert_close(descend(INVARIANT[name], changing, memory=True), plain, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(descend(INVARIANT[name], changing, memory=False), plain, rtol=1e-3)


def test_plain_descent_is_left_alone() -> None:
    w = nn.Parameter(torch.ones(3))
    optimizer = SGD([w], lr=0.1, momentum=0.9)
    w.sum().backward()
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    rescale_memory(optimizer, [w], 0.01)
    assert torch.equal(optimizer.state[w]["momentum_buffer"], before["state"][0]["momentum_buffer"])


def run(law: MetaController, applies: bool = True) -> tuple[Tensor, dict[str, float]]:
    """Adam's second moment and the weights after 3 steps, where one of two terms is a thousand times too strong."""
    torch.manual_seed(0)
    w, goal, other = nn.Parameter(torch.zeros(20)), torch.randn(20), torch.randn(20)
    executor = LossExecutor(
        {"fit": 1.0, "size": 1000.0},
        base="fit",
        modulators=[law],
        probe=lambda: (w - goal).square().mean(),
        total_steps=400,
        apply=applies,
    )
    optimizer = Adam([w], lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        executor({"fit": (w - goal).square().mean(), "size": (w - other).square().mean()}).backward()
        executor.step(optimizer)
    return optimizer.state[w]["exp_avg_sq"].clone(), executor.suggested


def test_a_law_that_climbs_brings_it_along_and_shadow_mode_does_not() -> None:
    plain, _ = run(MetaController(RULE), applies=False)
    climbed, weights = run(MetaController(CLIMB))
    shadow, suggested = run(MetaController(CLIMB), applies=False)
    assert torch.equal(shadow, plain)
    assert weights["size"] < 600 and suggested["size"] < 600
    assert float((climbed / plain).mean()) < 0.6
