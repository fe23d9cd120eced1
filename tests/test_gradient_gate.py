"""Gradient gate: what reaches the optimizer, in every precision, and whose a bad gradient is."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, Optimizer, RMSprop

from adaptive_loss import Guards, LossExecutor, gradient_gate
from adaptive_loss.gradient_gate import GradientGate, greatest_norm, weighted_norms
from adaptive_loss.gradients import total_norm
from adaptive_loss.step_record import StepRecord

OPTIMIZERS: list[Callable[[list[nn.Parameter]], Optimizer]] = [Adam, Adagrad, RMSprop, lambda p: SGD(p, 0.1, 0.9)]


def step_with(gradient: Tensor, make: Callable[[list[nn.Parameter]], Optimizer] = Adam, **guards: float) -> StepRecord:
    """One step of an executor whose loss has this gradient; what is not finite afterwards fails."""
    p = nn.Parameter(torch.zeros_like(gradient))
    executor, optimizer = LossExecutor({"a": 1.0}, guards=Guards(**guards)), make([p])  # type: ignore[arg-type]
    executor({"a": ((p - p.detach()) * gradient).sum() + 1}).backward()
    record = executor.step(optimizer)
    held = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
    assert all(bool(torch.isfinite(value).all()) for value in [p, *held])
    return record


@pytest.mark.parametrize("make", OPTIMIZERS)
@pytest.mark.parametrize("size", [2e18, 1e19, 1e25, 3e38])
def test_a_gradient_that_no_second_moment_can_hold_is_refused(
    make: Callable[[list[nn.Parameter]], Optimizer], size: float
) -> None:
    """Found by the torture: Adam's second moment became infinite and its parameter never moved again."""
    record = step_with(torch.tensor([size, 1.0]), make)
    assert not record.applied and record.cause == "gradient" and record.term == "a"
    assert record.reason == f"the gradient's norm is {record.gradient_norm:.6g}, an optimizer cannot hold its square"


@pytest.mark.parametrize("size", [2e18, 1e25, 3e38])
def test_clipped_it_passes(size: float) -> None:
    record = step_with(torch.tensor([size, 1.0]), clip_norm=1.0)
    assert record.applied and record.gradient_norm == pytest.approx(size, rel=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(width=32), min_size=1, max_size=4), st.sampled_from(OPTIMIZERS))
def test_no_gradient_of_float32_poisons_anything(
    numbers: list[float], make: Callable[[list[nn.Parameter]], Optimizer]
) -> None:
    record = step_with(torch.tensor(numbers), make)
    assert record.applied == (math.hypot(*numbers) <= greatest_norm([torch.tensor(numbers)]))


def test_the_limit_goes_by_the_least_precise_gradient() -> None:
    single, double, half = (torch.zeros(1, dtype=kind) for kind in (torch.float32, torch.float64, torch.float16))
    assert (
        greatest_norm([single])
        == greatest_norm([double, single])
        == greatest_norm([half])
        == pytest.approx(1.845e18, 1e-3)
    )
    assert greatest_norm([double]) == pytest.approx(1.34e153, rel=1e-2) and greatest_norm([]) == math.inf
    assert step_with(torch.tensor([1e100], dtype=torch.float64)).applied


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_norms_of_half_precision_are_taken_in_float32(kind: torch.dtype) -> None:
    rows = [(torch.randn(1000, generator=torch.Generator().manual_seed(i)) * 3000).to(kind) for i in range(3)]
    exact = math.hypot(*(float(row.double().norm()) for row in rows))
    assert exact > 65504  # more than float16 can say
    assert total_norm(rows) == pytest.approx(exact, rel=1e-6)
    mixed = [*rows, torch.tensor([1e5])]
    assert total_norm(mixed) == pytest.approx(math.hypot(exact, 1e5), rel=1e-6)


def scaled(gradient: float, scale: float) -> tuple[GradientGate, nn.Parameter, torch.amp.GradScaler]:
    p = nn.Parameter(torch.zeros(1))
    optimizer, scaler = SGD([p], lr=1.0), torch.amp.GradScaler("cpu", init_scale=scale)
    scaler.scale(p * gradient).sum().backward()
    return GradientGate(optimizer, scaler, None), p, scaler


def test_what_is_held_back_leaves_the_scaler_ready() -> None:
    gate, p, scaler = scaled(1e20, 2.0)
    assert gate.fault is not None and not gate.overflow and gate.norm == pytest.approx(1e20)
    gate.hold()
    assert p.item() == 0.0 and scaler.get_scale() == 2.0
    gate = GradientGate(gate.optimizer, scaler, None)  # a second unscale_ would raise if it were not ready
    assert not gate.overflow
    SGDs = GradientGate(SGD([p], lr=1.0), None, None)
    SGDs.hold()
    assert p.item() == 0.0


def test_an_overflow_lowers_the_scale_until_nothing_is_left_to_lower() -> None:
    gate, p, scaler = scaled(1e38, 1e4)
    assert gate.overflow and gate.fault == "the gradient is not finite"
    gate.step()
    assert p.item() == 0.0 and scaler.get_scale() == 5e3 and not gate.exhausted
    gate, *_ = scaled(math.inf, 1.5)
    gate.step()
    assert gate.exhausted


def test_an_executor_under_a_scaler_refuses_a_gradient_that_is_too_great_as_well() -> None:
    p = nn.Parameter(torch.zeros(1))
    executor, optimizer, scaler = LossExecutor({"a": 1.0}), Adam([p]), torch.amp.GradScaler("cpu", init_scale=2.0)
    for size, applied in [(1.0, True), (1e20, False), (1.0, True)]:
        optimizer.zero_grad()
        scaler.scale(executor({"a": (p - p.detach()).sum() * size + 1})).backward()
        assert executor.step(optimizer, scaler=scaler).applied is applied
    assert executor.skipped_steps == 1 and scaler.get_scale() == 2.0


# ---- whose it is --------------------------------------------------------------------------------------------------


def test_weighted_norms() -> None:
    w, v = nn.Parameter(torch.tensor([3.0, 4.0])), nn.Parameter(torch.tensor(0.0))
    losses = [w.square().sum() / 2, None, (v * v).sqrt(), w.sum() * 0 + 1e30 * v, torch.ones((), requires_grad=True)]
    found = weighted_norms(losses, torch.tensor([2.0, 1.0, 1.0, 1e10, 1.0], dtype=torch.float64))
    assert found.tolist() == pytest.approx([10.0, 0.0, math.inf, 1e40, 0.0])
    losses[0].backward()  # type: ignore[union-attr]
    assert w.grad is not None and w.grad.tolist() == [3.0, 4.0]


def named(n_terms: int, bad: Callable[[Tensor], Tensor]) -> list[str | None]:
    """Whom the second and third rejection of a bad gradient blame; the bad term is the last, and the smallest."""
    p = nn.Parameter(torch.tensor([1.0, 2.0]))
    names = [f"t{i}" for i in range(n_terms)]
    executor, optimizer = LossExecutor(dict.fromkeys(names, 1.0)), SGD([p], lr=0.1)
    found = []
    for _ in range(3):
        optimizer.zero_grad()
        losses = {name: p.square().sum() + 10 for name in names[:-1]} | {names[-1]: bad(p)}
        executor(losses).backward()
        found.append(executor.step(optimizer).term)
    return found[1:]


def test_from_the_second_time_on_the_right_term_is_named() -> None:
    assert named(3, lambda p: (p - p.detach()).abs().sum().sqrt()) == ["t2", "t2"]
    assert named(3, lambda p: (p - p.detach()).sum() * 1e25) == ["t2", "t2"]


def test_where_that_cannot_be_measured_it_is_the_first_to_look_at(monkeypatch: pytest.MonkeyPatch) -> None:
    assert named(33, lambda p: (p - p.detach()).abs().sum().sqrt()) == ["t0", "t0"]  # a backward pass each is too much

    def refuse(*_: object) -> None:
        raise RuntimeError("this compiled graph cannot be kept")

    monkeypatch.setattr(gradient_gate, "term_gradients", refuse)
    assert named(3, lambda p: (p - p.detach()).abs().sum().sqrt()) == ["t0", "t0"]


def test_a_gradient_that_no_term_made_is_the_models() -> None:
    p = nn.Parameter(torch.tensor([1.0, 2.0]))
    executor, optimizer = LossExecutor({"a": 1.0, "b": 1.0}), SGD([p], lr=0.1)
    for i in range(9):
        optimizer.zero_grad()
        executor({"a": p.sum(), "b": p.square().sum()}).backward()
        assert p.grad is not None
        p.grad[0] = math.nan
        assert executor.step(optimizer).term == ("b" if i == 0 else None)
    optimizer.zero_grad()
    executor({"a": p.sum(), "b": p.square().sum()}).backward()
    p.grad[0] = math.nan
    with pytest.raises(RuntimeError, match="because of the model: the gradient is not finite at step 0"):
        executor.step(optimizer)
