"""Weighting rules: closed forms, golden values, and the suite every rule must pass."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from adaptive_loss import LossExecutor
from adaptive_loss.weighting import weightings
from adaptive_loss.weighting.base import Weighting
from adaptive_loss.weighting.dwa import DWA, dwa_weights
from adaptive_loss.weighting.uncertainty import Uncertainty, uncertainty_weights

RULES = weightings.names()


def rule_for(rule: str, weights: dict[str, float]) -> Weighting:
    """The rule, made with what its constructor needs."""
    kind, last = weightings.get(rule), list(weights)[-1]
    needs, levels = kind(len(weights)).needs, [0.5 + i for i in range(len(weights))]
    noise = {need: {"levels": levels} for need in ("noise levels", "signal-to-noise ratios")}
    points = [{"step": step, **dict.fromkeys(weights, 0.5 + step)} for step in (1, 3, 4)]
    given = {**noise, "shares": {"shares": levels}, "a term": {"term": last}, "a schedule": {"schedule": points}}
    extra = {"switch_on": {"at": 1}, "wind_down": {"stall": 1}}.get(rule, {})
    return kind(len(weights), **extra, **{k: v for need in needs for k, v in given.get(need, {}).items()})


def executor_for(rule: str, weights: dict[str, float], unit: float = 1.0, **more: Any) -> LossExecutor:
    """An executor that gives the rule what it needs besides the losses; ``unit`` is that of the last term's loss."""
    made, (first, *_, last) = rule_for(rule, weights), [*weights, *weights]
    needs = made.needs
    return LossExecutor(
        weights,
        base=first if "base" in needs else None,
        targets={last: 2.0 * unit} if "targets" in needs else None,
        weighting=made,
        **{"total_steps": 4 if "total steps" in needs else None, **more},
    )


def live(value: float) -> torch.Tensor:
    return torch.tensor(value, requires_grad=True)


def test_names():
    assert {"fixed", "uncertainty", "dwa"} <= set(RULES) and "base" not in RULES


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("values", [(1.0,), (0.0, 0.0), (1e10, 1e-10), (-3.0, 2.0), (1.0, 1e-30, 5.0)])
def test_every_rule_on_degenerate_losses(rule, values):
    names = "abc"[: len(values)]
    executor = executor_for(rule, dict.fromkeys(names, 1.0))
    p = nn.Parameter(torch.tensor(1.0))
    optimizer = torch.optim.SGD([p, *executor.parameters()], lr=1e-12)
    for _ in range(4):
        optimizer.zero_grad()
        total = executor({n: p * v for n, v in zip(names, values, strict=True)}, tap=p)
        total.backward()
        assert total.dim() == 0 and math.isfinite(total.item())
        assert executor.step(optimizer).applied
        executor.end_epoch()
    assert all(math.isfinite(w) and w >= 0 for w in executor.weights.values())


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_sees_start_times_loss(rule):
    left = executor_for(rule, {"a": 1.0, "b": 10.0})
    right = executor_for(rule, {"a": 1.0, "b": 1.0}, unit=10.0)
    for factor in (1.0, 0.5, 0.4, 0.1):
        for executor, scale in ((left, 1.0), (right, 10.0)):
            p = nn.Parameter(torch.tensor(1.0))
            total = executor({"a": p * factor, "b": p * 3.0 * scale}, tap=p)
            total.backward()
            executor.step(torch.optim.SGD([p, *executor.parameters()], lr=0.0))
            executor.end_epoch()
        if rule not in ("equal", "encodec", "replay"):  # they undo start weights, or take them as shares
            assert left.weights["b"] == pytest.approx(10 * right.weights["b"], rel=1e-6, abs=1e-11)  # 1e-12: off


def test_uncertainty_in_closed_form():
    # total = Σ Lᵢ/(2 exp sᵢ) + sᵢ/2, so ∂/∂sᵢ = ½ − Lᵢ/(2 exp sᵢ).
    executor = LossExecutor({"a": 1.0, "b": 2.0}, weighting="uncertainty")
    assert isinstance(executor.weighting, Uncertainty)
    s = executor.weighting.log_variance
    with torch.no_grad():
        s.copy_(torch.tensor([0.3, -0.7]))
    total = executor({"a": live(2.0), "b": live(2.0)})
    total.backward()
    a, b = 2.0 / (2 * math.exp(0.3)), 4.0 / (2 * math.exp(-0.7))
    assert total.item() == pytest.approx(a + b + 0.15 - 0.35, rel=1e-6)
    assert s.grad.tolist() == pytest.approx([0.5 - a, 0.5 - b], rel=1e-6)
    assert executor.weights == pytest.approx({"a": 0.5 * math.exp(-0.3), "b": math.exp(0.7)}, rel=1e-6)


def test_uncertainty_leaves_an_absent_term_alone():
    executor = LossExecutor({"a": 1.0, "b": 1.0, "off": 0.0}, weighting="uncertainty")
    executor({"a": live(2.0)}).backward()
    assert executor.weighting.log_variance.grad.tolist() == [-0.5, 0.0, 0.0]


def test_uncertainty_finds_the_losses_as_variances():
    executor = LossExecutor({"a": 1.0, "b": 1.0}, weighting="uncertainty")
    optimizer = torch.optim.SGD(executor.parameters(), lr=0.5)
    for _ in range(200):
        optimizer.zero_grad()
        executor({"a": live(3.0), "b": live(0.2)}).backward()
        executor.step(optimizer)
    assert executor.weighting.log_variance.exp().tolist() == pytest.approx([3.0, 0.2], rel=1e-3)
    assert uncertainty_weights(torch.tensor(0.0)).item() == 0.5


def test_a_rule_that_learns_is_missed_in_the_optimizer():
    executor, p = LossExecutor({"a": 1.0}, weighting="uncertainty"), nn.Parameter(torch.tensor(1.0))
    executor({"a": p**2}).backward()
    with pytest.warns(UserWarning, match=r"give executor.parameters\(\) to the optimizer"):
        executor.step(torch.optim.SGD([p], lr=0.1))


def test_dwa_by_hand():
    # r = (0.5, 1), T = 2: w = 2·softmax(0.25, 0.5) = 2/(1 + e^±0.25).
    weights = dwa_weights(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 2.0]), 2.0)
    assert weights.tolist() == pytest.approx([2 / (1 + math.exp(0.25)), 2 / (1 + math.exp(-0.25))], rel=1e-6)


def test_dwa_over_epochs():
    executor = LossExecutor({"a": 1.0, "off": 0.0, "b": 1.0}, weighting="dwa")
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.0)
    seen = []
    for means in [(4.0, 2.0), (2.0, 2.0), (1.0, 3.0)]:
        for wiggle in (0.9, 1.1):  # the epoch's mean counts, not its last step
            executor({"a": live(means[0] * wiggle), "b": live(means[1] * wiggle)}).backward()
            seen.append(executor.step(optimizer).weights)
        executor.end_epoch()
    golden = 2 / (1 + math.exp(0.25))  # r = (2/4, 2/2) and K = 2: the term that is off does not count
    assert seen[:4] == [{"a": 1.0, "off": 0.0, "b": 1.0}] * 4
    assert seen[5] == pytest.approx({"a": golden, "off": 0.0, "b": 2 - golden}, rel=1e-6)


@pytest.mark.parametrize(
    ("last", "before"),
    [([math.nan, 1.0], [1.0, 1.0]), ([1.0, 1.0], [0.0, 1.0]), ([0.0, 1.0], [0.0, 1.0])],
)
def test_dwa_counts_what_cannot_be_told_as_one(last, before):
    weights = dwa_weights(torch.tensor(last), torch.tensor(before), 2.0)
    assert weights.tolist() == pytest.approx([1.0, 1.0])


def test_dwa_state_is_not_shared_with_a_saved_one():
    rule = DWA(1)
    state = rule.state_dict()
    rule.after_step(torch.tensor([3.0], dtype=torch.float64), None)
    assert state["total"].item() == 0.0


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_dwa_refuses_a_temperature(temperature):
    with pytest.raises(ValueError, match="temperature"):
        DWA(2, temperature)
