"""Where a window of forward passes begins and ends: accumulation, users who step themselves, giving up."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from adaptive_loss import Guards, LossExecutor


def model() -> tuple[nn.Parameter, torch.optim.Optimizer]:
    p = nn.Parameter(torch.tensor(1.0))
    return p, torch.optim.SGD([p], lr=0.1)


def test_a_bad_batch_rejects_its_whole_window_also_before_the_first_step() -> None:
    p, optimizer = model()
    executor = LossExecutor({"a": 1.0})
    executor({"a": p * math.nan}).backward()
    executor({"a": p**2}).backward()
    record = executor.step(optimizer)
    assert not record.applied and record.term == "a" and p.item() == 1.0
    executor({"a": p**2}).backward()
    assert executor.step(optimizer).applied


def test_who_steps_himself_gets_over_a_bad_batch() -> None:
    p, optimizer = model()
    executor = LossExecutor({"a": 1.0})
    with pytest.warns(UserWarning, match=r"stepped outside executor\.step"):
        for factor in (1.0, math.nan, 1.0, 1.0, 1.0):
            optimizer.zero_grad()
            executor({"a": factor * p**2}).backward()
            optimizer.step()
    assert executor.skipped_steps == 1 and executor.rejected_in_row == 0 and math.isfinite(p.item())


def test_ten_bad_batches_raise_also_where_nobody_calls_step() -> None:
    p, _ = model()
    executor = LossExecutor({"a": 1.0})
    for _ in range(9):
        executor({"a": p * math.nan}).backward()
    with pytest.raises(RuntimeError, match="10 steps in a row were rejected, the last one because of term 'a'"):
        executor({"a": p * math.nan})


def test_after_giving_up_on_gradients_the_next_forward_starts_afresh() -> None:
    p = nn.Parameter(torch.tensor(0.0))
    optimizer = torch.optim.SGD([p], lr=0.1)
    executor = LossExecutor({"a": 1.0}, guards=Guards(max_rejections=1))
    executor({"a": p.abs().sqrt()}).backward()
    with pytest.raises(RuntimeError, match="the gradient is not finite"):
        executor.step(optimizer)
    optimizer.zero_grad()
    executor({"a": (p - 1) ** 2}).backward()
    record = executor.step(optimizer)
    assert record.applied and record.losses == {"a": 1.0}


def test_state_of_other_start_weights_is_refused() -> None:
    saved = LossExecutor({"a": 5.0, "b": 1.0}).state_dict()
    with pytest.raises(ValueError, match="start weights are '5, 1', here '1, 1'"):
        LossExecutor({"a": 1.0, "b": 1.0}).load_state_dict(saved)
