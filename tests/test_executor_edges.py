"""LossExecutor where models, optimizers and rules are unusual, and where a step is given up late."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, SparseAdam

from adaptive_loss import Guards, LossExecutor, LossMonitor, MetaController
from adaptive_loss.events import Event
from adaptive_loss.gradients import gramian, preconditioner
from adaptive_loss.meta_controller import RULE
from adaptive_loss.modulator import Modulator
from adaptive_loss.probes import held_out
from adaptive_loss.spike_gate import SpikeGate
from adaptive_loss.weighting.base import Weighting


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Push(Modulator):
    """Moves every weight by the same number of nats a step."""

    def __init__(self, rate: float) -> None:
        self.rate = rate

    def after_step(self, context: Any) -> list[Event]:
        self.log_gain = self.log_gain + self.rate
        return []


def same(a: Any, b: Any) -> bool:
    """Equal to the last bit, NaN to NaN, through nested containers."""
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a.nan_to_num(7e77), b.nan_to_num(7e77))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)


def state(executor: LossExecutor) -> Any:
    """All state but the counters of rejections."""
    extra = copy.deepcopy(executor.state_dict()["_extra_state"])
    return {name: value for name, value in extra.items() if name not in ("rejected_in_row", "skipped_steps")}


# ---- a window of several batches ----------------------------------------------------------------------------------


def test_weights_are_held_within_a_window_though_the_share_cap_sees_other_losses() -> None:
    p = nn.Parameter(torch.ones(2))
    guards = Guards(rate_limit=0.5, share_cap=0.6, spikes=False)
    executor = LossExecutor({"a": 1.0, "b": 1.0}, base="a", modulators=[Push(3.0)], guards=guards)
    optimizer = SGD([p], lr=0.0)
    for _ in range(4):
        optimizer.zero_grad()
        seen = []
        for part in range(3):
            executor({"a": p.square().sum() * (3 - part), "b": p.sum() * (1 + part)}).backward()
            seen.append(executor.weights)
        record = executor.step(optimizer)
        assert seen == [record.weights] * 3
        # Σ over parts of w_a·(3 − part)·2p + w_b·(1 + part), both factors summing to 6
        expected = 12 * record.weights["a"] + 6 * record.weights["b"]
        assert p.grad is not None and p.grad.tolist() == pytest.approx([expected] * 2)
    assert record.weights["b"] > 1.0


@pytest.mark.parametrize("fault", ["gradient", "second part"])
def test_a_step_given_up_after_its_look_ahead_leaves_no_trace(fault: str) -> None:
    p, data = nn.Parameter(torch.ones(2)), torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    executor = LossExecutor(
        {"a": 1.0, "b": 1.0},
        base="a",
        modulators=[MetaController(RULE), LossMonitor()],
        probe=held_out(lambda x: (x - p).square().mean(), data, batch_size=8),
        total_steps=60,
        guards=Guards(rate_limit=0.1, share_cap=0.3),
    )
    optimizer = Adam([p], lr=0.01)
    for _ in range(12):
        before, weights = state(executor), executor.weights
        optimizer.zero_grad()
        executor({"a": p.square().sum(), "b": p.sum() + 5}).backward()
        if fault == "gradient":
            assert p.grad is not None
            p.grad.fill_(math.nan)
        else:
            executor({"a": p.square().sum(), "b": p.sum() * math.nan}).backward()
        record = executor.step(optimizer)
        assert not record.applied and record.weights == executor.weights == weights
        assert same(before, state(executor))
        optimizer.zero_grad()
        executor({"a": p.square().sum(), "b": p.sum() + 5}).backward()
        assert executor.step(optimizer).applied
    assert executor.signals.look_aheads >= 8


def test_a_state_saved_before_the_step_holds_the_weights_of_the_last_one() -> None:
    p = nn.Parameter(torch.ones(2))
    executor, optimizer = LossExecutor({"a": 1.0, "b": 1.0}, base="a", modulators=[Push(0.1)]), SGD([p], lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        executor({"a": p.square().sum(), "b": p.sum()}).backward()
        executor.step(optimizer)
    before, weights = state(executor), executor.weights
    executor({"a": p.square().sum(), "b": p.sum()})
    assert executor.weights["b"] > weights["b"] and same(before, state(executor))


def test_who_catches_the_error_and_goes_on_is_told_again_and_can_recover() -> None:
    p = nn.Parameter(torch.tensor(1.0))
    executor, optimizer, raised = LossExecutor({"a": 1.0}), SGD([p], lr=0.1), 0
    for _ in range(13):
        optimizer.zero_grad()
        try:
            executor({"a": p * math.nan}).backward()
            executor.step(optimizer)
        except RuntimeError:
            raised += 1
    assert raised == 4
    optimizer.zero_grad()
    executor({"a": p**2}).backward()
    assert executor.step(optimizer).applied and executor.rejected_in_row == 0


def test_an_overflow_that_no_scale_can_cure_raises() -> None:
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient * math.nan

    p = nn.Parameter(torch.ones(2))
    executor, optimizer = LossExecutor({"a": 1.0}), SGD([p], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    steps, causes = 0, []
    with pytest.raises(RuntimeError, match=r"10 steps in a row.*the gradient is not finite"):
        while True:
            steps += 1
            optimizer.zero_grad()
            scaler.scale(executor({"a": Broken.apply(p.sum())})).backward()
            causes.append(executor.step(optimizer, scaler=scaler).cause)
    assert causes == ["overflow"] * 2 + ["gradient"] * 9
    assert steps == 2 + 10  # 4 → 2 → 1 were overflows; from scale 1 on the gradient itself is to blame


# ---- models and optimizers ----------------------------------------------------------------------------------------


def test_a_parameter_without_dimensions_can_be_looked_ahead_at() -> None:
    p, q = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.ones(3))
    executor = LossExecutor(
        {"a": 1.0, "b": 1.0},
        base="a",
        modulators=[MetaController(RULE)],
        probe=lambda: (p - 2) ** 2 + q.square().sum(),
        total_steps=20,
    )
    optimizer = Adam([p, q], lr=0.1)
    for _ in range(4):
        optimizer.zero_grad()
        executor({"a": (p - 2) ** 2, "b": q.square().sum() + p}).backward()
        executor.step(optimizer)
    assert executor.signals.look_aheads == 3 and executor.signals.gain.abs().min() > 0


def test_gradients_in_float64_are_measured_in_float64() -> None:
    rows = torch.randn(3, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(gramian([[row] for row in rows], [1.0]), rows @ rows.T, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("modulators", [(), (MetaController(RULE),)], ids=["fixed", "adaptive"])
def test_sparse_gradients(modulators: tuple[Modulator, ...]) -> None:
    words = nn.Embedding(5, 2, sparse=True)
    executor = LossExecutor(
        {"a": 1.0, "b": 1.0},
        base="a",
        modulators=modulators,
        probe=lambda: words(torch.tensor([1, 2])).square().sum(),
        total_steps=20,
    )
    optimizer = SparseAdam(words.parameters(), lr=0.1)
    for _ in range(4):
        optimizer.zero_grad()
        chosen = words(torch.tensor([1, 1, 2]))
        executor({"a": chosen.square().sum(), "b": chosen.abs().sum()}).backward()
        gradient = words.weight.grad
        assert gradient is not None
        norm = float(gradient.to_dense().norm())
        record = executor.step(optimizer)
        assert record.applied and record.gradient_norm == pytest.approx(norm)
    assert bool(executor.signals.look_aheads) == bool(modulators)


def test_the_metric_carries_learning_rates_where_they_differ() -> None:
    a, b, c = (nn.Parameter(torch.ones(2)) for _ in range(3))
    groups = [{"params": [a]}, {"params": [b], "lr": 0.02}, {"params": [c], "lr": 0.0}]
    assert preconditioner(SGD(groups, lr=0.1), [a, b, c]) == pytest.approx([1.0, 0.2, 0.0])
    assert preconditioner(SGD([a, b], lr=0.003), [a, b]) == [1.0, 1.0]
    assert preconditioner(SGD([a, b], lr=0.0), [a, b]) == [1.0, 1.0]  # a warm-up's first step


def test_two_optimizers_of_one_executor_make_one_step() -> None:
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    executor, first, second = LossExecutor({"x": 1.0, "y": 1.0}), SGD([a], lr=0.1), SGD([b], lr=0.1)
    for step in range(3):
        first.zero_grad()
        second.zero_grad()
        executor({"x": a.square().sum(), "y": b.square().sum()}).backward()
        assert executor.step(first).applied and executor.step(second).applied
        assert a.tolist() == b.tolist() == pytest.approx([0.8 ** (step + 1)] * 2)
    assert executor.signals.step == 3 and executor.skipped_steps == 0


@pytest.mark.parametrize("reaches", [False, True])
def test_a_probe_that_reaches_no_parameter_is_told_once_and_a_tap_of_features_does_not_hide_it(reaches: bool) -> None:
    body, head, x = nn.Linear(2, 3), nn.Linear(3, 1), torch.ones(4, 2)
    other = nn.Parameter(torch.ones(2))
    executor = LossExecutor(
        {"a": 1.0, "b": 1.0},
        base="a",
        modulators=[MetaController(RULE)],
        probe=lambda: head(body(x)).square().mean() if reaches else other.square().sum(),
        total_steps=20,
    )
    optimizer = SGD([*body.parameters(), *head.parameters()], lr=0.01)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(5):
            optimizer.zero_grad()
            hidden = body(x)
            out = head(hidden)
            # The probe has a graph of its own, which does not pass through this step's features.
            executor({"a": out.square().mean(), "b": out.abs().mean()}, tap=hidden).backward()
            executor.step(optimizer)
    assert ["the probe's gradient is 0" in str(w.message) for w in told] == [True] * (not reaches)


def test_a_probe_that_is_a_module_is_not_rewound() -> None:
    class Objective(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self) -> Tensor:
            return self.model(torch.ones(1, 2)).square().sum()

    model = nn.Linear(2, 1)
    modulators = [MetaController(RULE), LossMonitor()]
    executor = LossExecutor({"a": 1.0, "b": 1.0}, modulators=modulators, probe=Objective(model), total_steps=40)
    optimizer = SGD(model.parameters(), lr=0.01)
    for step in range(12):
        optimizer.zero_grad()
        out = model(torch.ones(1, 2))
        executor({"a": out.square().sum(), "b": out.exp().sum()}).backward()
        if step % 3 == 2:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            next(model.parameters()).grad.fill_(math.nan)  # type: ignore[union-attr]
        assert executor.step(optimizer).applied == (step % 3 != 2)
    assert state(executor)["probe"] is None and not list(executor.parameters())


# ---- rules, modulators, guards ------------------------------------------------------------------------------------


def test_a_rule_must_give_a_weight_for_each_term() -> None:
    class One(Weighting):
        def forward(self, losses: Tensor, context: Any) -> Tensor:
            return torch.ones(1)

    p = nn.Parameter(torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"weights of shape \(1,\): give \(2,\)"):
        LossExecutor({"a": 1.0, "b": 1.0}, weighting=One(2))({"a": p**2, "b": p**2})


def test_two_executors_cannot_share_a_modulator() -> None:
    shared = Push(0.1)
    LossExecutor({"a": 1.0}, modulators=[shared])
    with pytest.raises(ValueError, match="this Push belongs to another executor: make one for each"):
        LossExecutor({"a": 1.0, "b": 1.0}, modulators=[shared])


def test_a_term_that_is_alone_this_step_keeps_its_raised_weight() -> None:
    p = nn.Parameter(torch.ones(2))
    executor = LossExecutor({"a": 1.0, "b": 1.0}, base="a", modulators=[Push(0.1)])
    optimizer = SGD([p], lr=0.0)
    for step in range(6):
        loss = p.square().sum()
        executor({"b": loss} if step % 2 else {"a": loss, "b": loss}).backward()
        executor.step(optimizer)
    assert executor.weights == pytest.approx({"a": 1.0, "b": math.exp(0.5)})


def test_a_rate_limit_of_any_size() -> None:
    p = nn.Parameter(torch.ones(2))
    guards = Guards(rate_limit=1000.0, share_cap=None)
    executor = LossExecutor({"a": 1.0, "b": 1.0}, base="a", modulators=[Push(2.0)], guards=guards)
    optimizer = SGD([p], lr=0.0)
    for _ in range(3):
        executor({"a": p.square().sum(), "b": p.sum()}).backward()
        executor.step(optimizer)
    assert executor.weights["b"] == pytest.approx(math.exp(4.0))


def test_an_epoch_without_an_accepted_step_keeps_the_history_of_dwa() -> None:
    p = nn.Parameter(torch.ones(2))
    executor, optimizer = LossExecutor({"a": 1.0, "b": 1.0}, weighting="dwa"), SGD([p], lr=0.01)

    def look(b: float) -> dict[str, float]:
        optimizer.zero_grad()
        executor({"a": p.square().sum(), "b": p.sum() * 0 + b}).backward()
        return executor.weights

    for b in (1.0, 2.0):
        look(b)
        executor.step(optimizer)
        executor.end_epoch()
    before = look(1.0)
    executor.end_epoch()
    assert look(1.0) == before and before["b"] > 1.2


def test_a_term_back_after_a_whole_window_away_starts_a_new_history() -> None:
    gate, both = SpikeGate(2, 32), torch.ones(2, dtype=torch.bool)

    def values(b: float) -> Tensor:
        return torch.tensor([1.0, b], dtype=torch.float64)

    for _ in range(40):
        gate.admit(values(1.0))
    for _ in range(31):
        gate.admit(values(math.nan))
    assert gate.worst(values(100.0), both) == 1
    twin = SpikeGate(2, 32)
    twin.load_state_dict(gate.state_dict())
    for each in (gate, twin):
        each.admit(values(math.nan))
        assert each.worst(values(100.0), both) is None and each.worst(torch.tensor([100.0, 1.0]), both) == 0
