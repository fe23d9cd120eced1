"""What the executor tells its user once, in words."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from adaptive_loss import LossExecutor, loss_executor


@pytest.fixture
def told() -> Iterator[Callable[[], list[str]]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield lambda: [str(warning.message).removeprefix("adaptive_loss: ") for warning in caught]


def train(executor: LossExecutor, steps: int) -> None:
    p = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = torch.optim.SGD([p, *executor.parameters()], lr=1e-3)
    for _ in range(steps):
        executor({"a": p.square().sum(), "b": p.abs().sum()}).backward()
        executor.step(optimizer)


def test_a_rule_that_learns_learns_nothing_in_shadow_mode(told: Callable[[], list[str]]) -> None:
    executor = LossExecutor({"a": 1.0, "b": 1.0}, weighting="uncertainty", apply=False)
    assert told() == ["in shadow mode 'uncertainty' learns nothing: its weights stay at the start"]
    before = [p.clone() for p in executor.parameters()]
    train(executor, 3)
    assert all(torch.equal(a, b) for a, b in zip(before, executor.parameters(), strict=True))


def test_a_rule_that_waits_for_epochs_says_so_after_a_while(
    told: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_executor, "PATIENCE", 5)
    train(LossExecutor({"a": 1.0, "b": 1.0}, weighting="dwa"), 5)
    assert told() == []
    train(LossExecutor({"a": 1.0, "b": 1.0}, weighting="dwa"), 8)
    (line,) = told()
    assert line.startswith("weighting 'dwa' needs epochs: call executor.end_epoch()")
    knows = LossExecutor({"a": 1.0, "b": 1.0}, weighting="dwa")
    knows.end_epoch()
    train(knows, 8)
    assert len(told()) == 1


def test_the_probe_is_the_one_that_was_given() -> None:
    def probe() -> Tensor:
        return torch.ones((), requires_grad=True)

    assert LossExecutor({"a": 1.0}, probe=probe).probe is probe and LossExecutor({"a": 1.0}).probe is None
