"""LossExecutor: exact totals, rejection without a trace, gradients, accumulation, mixed precision."""

import copy
import math
import warnings

import pytest
import torch
from torch import Tensor, nn

from adaptive_loss import Guards, LossExecutor
from adaptive_loss.events import Event
from adaptive_loss.modulator import Modulator
from adaptive_loss.weighting.base import Weighting

WEIGHTS = {"fit": 1.0, "small": 0.3, "sharp": 0.7}


class Push(Modulator):
    """Moves every weight by a given number of nats a step."""

    def __init__(self, *rates: float) -> None:
        self.rates = rates

    def after_step(self, context) -> list[Event]:
        self.log_gain = self.log_gain + torch.tensor(self.rates, dtype=torch.float64)
        return []


class Given(Weighting):
    """Whatever weights the test says."""

    def __init__(self, *values: float) -> None:
        super().__init__(len(values))
        self.values = values

    def forward(self, losses: Tensor, context) -> Tensor:
        return torch.tensor(self.values, dtype=torch.float64)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def batch(step: int) -> Tensor:
    return torch.randn(16, 4, generator=torch.Generator().manual_seed(step))


def terms(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    out = net(x)
    goal = x.sum(1, keepdim=True)
    return {"fit": (out - goal).square().mean(), "small": out.abs().mean(), "sharp": (out - goal).abs().mean()}


def quiet(*args, **kwargs) -> LossExecutor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return LossExecutor(*args, **kwargs)


def same(a, b) -> bool:
    """Equal to the last bit, NaN to NaN, through nested containers."""
    if isinstance(a, Tensor):
        return torch.equal(a, b) or (a.is_floating_point() and bool(((a == b) | (a.isnan() & b.isnan())).all()))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (isinstance(a, float) and math.isnan(a) and math.isnan(b))


def everything(net: nn.Module, optimizer: torch.optim.Optimizer, executor: LossExecutor) -> dict:
    state = executor.state_dict()
    counters = ("rejected_in_row", "skipped_steps")
    state["_extra_state"] = {k: v for k, v in state["_extra_state"].items() if k not in counters}
    return copy.deepcopy({"net": net.state_dict(), "optimizer": optimizer.state_dict(), "executor": dict(state)})


def ready(executor: LossExecutor, steps: int = 3, lr: float = 0.01):
    net = model()
    optimizer = torch.optim.Adam([*net.parameters(), *executor.parameters()], lr=lr)
    for step in range(steps):
        optimizer.zero_grad()
        executor(terms(net, batch(step))).backward()
        assert executor.step(optimizer).applied
    optimizer.zero_grad()
    return net, optimizer


# ---- totals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_fixed_total_is_the_weighted_sum_bit_for_bit(dtype):
    dice = torch.Generator().manual_seed(0)
    weights = {"a": 1.0, "b": 0.1, "off": 0.0, "c": 1 / 3, "d": 1e-7}
    executor = LossExecutor(weights, base="a")
    for _ in range(50):
        losses = {n: torch.randn((), generator=dice).to(dtype).requires_grad_() for n in weights}
        plain = losses["a"] * 1.0 + losses["b"] * 0.1 + losses["c"] * (1 / 3) + losses["d"] * 1e-7
        assert torch.equal(executor(losses), plain)
        del losses["b"]
        losses["c"] = None
        assert torch.equal(executor(losses), losses["a"] * 1.0 + losses["d"] * 1e-7)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e300])
def test_a_term_that_is_off_stays_off_whatever_it_is(value):
    executor = LossExecutor({"a": 1.0, "off": 0.0}, weighting="uncertainty")
    p = nn.Parameter(torch.tensor(2.0))
    optimizer = torch.optim.SGD([p, *executor.parameters()], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        executor({"a": p**2, "off": torch.tensor(value, dtype=torch.float64)}).backward()
        record = executor.step(optimizer)
        assert record.applied and record.weights["off"] == 0.0
    assert math.isfinite(p.item()) and torch.isfinite(executor.weighting.log_variance).all()
    assert math.isnan(executor.signals.fast[1])
    total = executor({"off": torch.tensor(1.0)})
    total.backward()
    assert total.item() == 0.0


def test_under_no_grad_it_only_looks():
    executor = LossExecutor(WEIGHTS)
    net, optimizer = ready(executor)
    before = everything(net, optimizer, executor)
    with torch.no_grad():
        total = executor(terms(net, batch(9)))
    assert not total.requires_grad and same(before, everything(net, optimizer, executor))
    with torch.inference_mode():
        executor({"fit": torch.tensor(math.nan)})
    assert same(before, everything(net, optimizer, executor))


def test_forward_without_a_step_leaves_no_trace():
    executor = quiet(WEIGHTS, base="fit", modulators=[Push(0.0, 0.1, 0.0)])
    net, optimizer = ready(executor)
    before = everything(net, optimizer, executor)["executor"]["_extra_state"]["signals"]
    for step in range(5):
        executor(terms(net, batch(step)))
    assert same(before, everything(net, optimizer, executor)["executor"]["_extra_state"]["signals"])


def test_to_and_half_leave_the_executor_where_it_is():
    executor = LossExecutor({"a": 1.0, "b": 1.0}, weighting="dwa").half().to("meta")
    assert executor.weighting.total.dtype == torch.float64 and executor.weighting.total.device.type == "cpu"
    assert executor.apply(lambda module: None) is executor  # nn.Module's own method is not shadowed


# ---- what a user gets wrong ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "error", "words"),
    [
        ({"weighting": "nosuch"}, ValueError, "unknown weighting 'nosuch'"),
        ({"weighting": Given(1.0)}, ValueError, "the weighting is over 1 terms"),
        ({"weighting": Given}, TypeError, "weighting is a"),
        ({"weighting": "math:nosuch"}, ValueError, "cannot load weighting"),
        ({"base": "z"}, KeyError, "'z' is not a term"),
        ({"total_steps": 0}, ValueError, "total_steps is 0"),
        ({"total_steps": math.nan}, ValueError, "total_steps is nan"),
        ({"probe": torch.ones(())}, TypeError, "probe is a Tensor"),
    ],
)
def test_bad_arguments(kwargs, error, words):
    with pytest.raises(error) as caught:
        LossExecutor(WEIGHTS, **kwargs)
    assert words in str(caught.value)


# ---- rejection ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", ["fixed", "uncertainty", "dwa"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_term_that_is_not_finite_rejects_without_a_trace(weighting, value):
    executor = quiet(WEIGHTS, base="fit", weighting=weighting, modulators=[Push(0.0, 0.1, -0.1)])
    net, optimizer = ready(executor)
    before = everything(net, optimizer, executor)
    losses = terms(net, batch(5))
    losses["small"] = losses["small"] * value
    total = executor(losses)
    total.backward()
    record = executor.step(optimizer)
    assert not record.applied and record.term == "small" and "the loss is" in str(record.reason)
    assert [event.kind for event in record.events] == ["skip"]
    assert executor.skipped_steps == 1 and executor.rejected_in_row == 1
    assert same(before, everything(net, optimizer, executor)) and record.weights == executor.weights
    optimizer.zero_grad()
    executor(terms(net, batch(6))).backward()
    assert executor.step(optimizer).applied and executor.rejected_in_row == 0


def test_ten_in_a_row_raise_and_name_the_term():
    executor = LossExecutor(WEIGHTS)
    net, optimizer = ready(executor)
    for bad in [*[True] * 9, False, *[True] * 9]:
        optimizer.zero_grad()
        executor(terms(net, batch(5)) | ({"sharp": net(batch(1)).sum() * math.nan} if bad else {})).backward()
        assert executor.step(optimizer).applied is not bad
    before = everything(net, optimizer, executor)
    with pytest.raises(
        RuntimeError, match=r"10 steps in a row.*term 'sharp': the loss is nan at step 4.*fit \d"
    ) as caught:
        executor(terms(net, batch(5)) | {"sharp": net(batch(1)).sum() * math.nan})
    assert "\n" not in str(caught.value) and same(before, everything(net, optimizer, executor))


def test_a_user_who_steps_himself_is_stopped_as_well():
    executor = LossExecutor({"a": 1.0}, guards=Guards(max_rejections=3))
    p = nn.Parameter(torch.tensor(1.0))
    for _ in range(2):
        executor({"a": p * math.nan}).backward()
    with pytest.raises(RuntimeError, match="3 steps in a row were rejected, the last one because of term 'a'"):
        executor({"a": p * math.nan})


def test_spikes_reject_and_the_next_step_is_fine():
    executor = LossExecutor({"a": 1.0})
    p = nn.Parameter(torch.tensor(1.0))
    optimizer = torch.optim.SGD([p], lr=0.0)
    outcome = []
    for step in range(60):
        executor({"a": p * (1e4 if step in (30, 45) else 1.0)}).backward()
        outcome.append(executor.step(optimizer).applied)
    assert [step for step, applied in enumerate(outcome) if not applied] == [30, 45]
    lenient = LossExecutor({"a": 1.0}, guards=Guards(spikes=False))
    for step in range(60):
        lenient({"a": p * (1e4 if step == 30 else 1.0)}).backward()
        assert lenient.step(optimizer).applied


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_weights_that_cannot_be_used_reject(value):
    executor = LossExecutor({"a": 1.0, "b": 1.0}, weighting=Given(1.0, value))
    p = nn.Parameter(torch.tensor(1.0))
    executor({"a": p**2, "b": p**2}).backward()
    record = executor.step(torch.optim.SGD([p], lr=0.1))
    assert not record.applied and record.term == "b" and "weight" in str(record.reason)
    assert p.item() == 1.0 and executor.weights == {"a": 1.0, "b": 1.0}


def test_a_gradient_that_is_not_finite_rejects_without_a_trace():
    executor = LossExecutor({"a": 1.0, "b": 5.0})
    p = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = torch.optim.Adam([p], lr=0.1)
    executor({"a": p.sum() ** 2, "b": p.sum() ** 2}).backward()
    assert executor.step(optimizer).applied
    before = everything(nn.ParameterList([p]), optimizer, executor)
    optimizer.zero_grad()
    executor({"a": p.sum() ** 2, "b": p.sum() ** 2 + (p - p.detach()).abs().sum().sqrt()}).backward()
    record = executor.step(optimizer)
    assert not record.applied and record.reason == "the gradient is not finite" and record.term == "b"
    assert not math.isfinite(record.gradient_norm)
    assert same(before, everything(nn.ParameterList([p]), optimizer, executor))


def test_ten_bad_gradients_in_a_row_raise():
    executor = LossExecutor({"a": 1.0})
    p = nn.Parameter(torch.tensor(0.0))
    optimizer = torch.optim.SGD([p], lr=0.1)
    for _ in range(9):
        executor({"a": (p * p).sqrt()}).backward()
        assert not executor.step(optimizer).applied
    executor({"a": (p * p).sqrt()}).backward()
    with pytest.raises(RuntimeError, match="10 steps in a row"):
        executor.step(optimizer)
    assert p.item() == 0.0


# ---- step ---------------------------------------------------------------------------------------------------------


def test_step_without_gradients_or_without_a_loss():
    executor = LossExecutor({"a": 1.0})
    p = nn.Parameter(torch.tensor(1.0))
    optimizer = torch.optim.AdamW([p], lr=0.1)
    assert "no loss" in str(executor.step(optimizer).reason)
    executor({"a": p**2})
    assert executor.step(optimizer).gradient_norm == 0.0
    assert p.item() == 1.0 and executor.skipped_steps == 0


def test_clipping_scales_to_the_norm_and_is_reported():
    for limit, step in [(1.0, 1.0), (100.0, 5.0)]:
        executor = LossExecutor({"a": 1.0}, guards=Guards(clip_norm=limit))
        p = nn.Parameter(torch.zeros(2))
        executor({"a": (p * torch.tensor([3.0, 4.0])).sum()}).backward()
        record = executor.step(torch.optim.SGD([p], lr=1.0))
        assert record.gradient_norm == pytest.approx(5.0)
        assert p.detach().norm().item() == pytest.approx(step, rel=1e-6)


def test_a_user_who_steps_the_optimizer_himself_is_told_once():
    executor = LossExecutor(WEIGHTS, weighting="dwa")
    net = model()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for step in range(6):
            optimizer.zero_grad()
            executor(terms(net, batch(step))).backward()
            optimizer.step()
    assert [str(w.message) for w in told if "outside executor.step" in str(w.message)] == [str(told[0].message)]
    assert executor.signals.step == 6


def test_events_do_not_pile_up_for_a_user_who_never_drains():
    executor = LossExecutor({"a": 1.0}, guards=Guards(max_rejections=10**9))
    p = nn.Parameter(torch.tensor(1.0))
    optimizer = torch.optim.SGD([p], lr=0.1)
    for _ in range(30):
        executor({"a": p * math.nan})
        assert len(executor.step(optimizer).events) == 1
    assert len(executor.drain_events()) == 30 and executor.drain_events() == []


# ---- accumulation and mixed precision -----------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_accumulation_gives_the_gradient_of_the_mean_and_counts_once(parts):
    executor, net = LossExecutor(WEIGHTS, base="fit"), model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    x = batch(0)
    plain = sum(WEIGHTS[n] * loss for n, loss in terms(net, x).items())
    expected = torch.autograd.grad(plain, list(net.parameters()))
    for part in x.chunk(parts):
        (executor(terms(net, part)) / parts).backward()
    record = executor.step(optimizer)
    for p, g in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-5, atol=1e-7)
    assert record.step == executor.signals.step == 1 and executor.history.steps == 1
    means = {n: loss.item() for n, loss in terms(net, x).items()}
    assert record.losses == pytest.approx(means, rel=1e-5)


def test_one_bad_part_rejects_the_whole_step_and_counts_once():
    executor = quiet(WEIGHTS, base="fit", modulators=[Push(0.0, 0.5, 0.5)], guards=Guards(rate_limit=0.1))
    net, optimizer = ready(executor)
    before = everything(net, optimizer, executor)
    for bad in (False, True, True, False):
        losses = terms(net, batch(1))
        (executor(losses | ({"fit": losses["fit"] * math.nan} if bad else {})) / 4).backward()
    assert not executor.step(optimizer).applied and executor.rejected_in_row == 1
    assert same(before, everything(net, optimizer, executor))


def test_the_rate_limit_holds_over_a_step_not_over_each_part():
    executor = quiet(WEIGHTS, base="fit", modulators=[Push(0.0, 3.0, 0.0)], guards=Guards(rate_limit=0.1))
    net, _optimizer = ready(executor, steps=1)
    for _ in range(4):
        executor(terms(net, batch(1))).backward()
    assert executor.weights["small"] == pytest.approx(0.3 * math.exp(0.1))


def test_scaler_overflow_skips_and_statistics_stand_still():
    executor = LossExecutor(WEIGHTS)
    net, optimizer = ready(executor)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(executor(terms(net, batch(3)))).backward()
    assert executor.step(optimizer, scaler=scaler).applied and scaler.get_scale() == 1024.0
    before = everything(net, optimizer, executor)
    optimizer.zero_grad()
    scaler.scale(executor(terms(net, batch(4)))).backward()
    next(net.parameters()).grad[0, 0] = math.inf
    record = executor.step(optimizer, scaler=scaler)
    assert not record.applied and record.reason == "mixed-precision overflow" and scaler.get_scale() == 512.0
    assert same(before, everything(net, optimizer, executor)) and executor.rejected_in_row == 0
    optimizer.zero_grad()
    scaler.scale(executor(terms(net, batch(4)) | {"fit": net(batch(1)).sum() * math.nan})).backward()
    assert not executor.step(optimizer, scaler=scaler).applied and scaler.get_scale() == 512.0


def test_scaled_steps_equal_plain_steps():
    left, right = LossExecutor(WEIGHTS), LossExecutor(WEIGHTS)
    (net, optimizer), (other, twin) = ready(left), ready(right)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    left(terms(net, batch(1))).backward(), left.step(optimizer)
    scaler.scale(right(terms(other, batch(1)))).backward(), right.step(twin, scaler=scaler)
    assert same(net.state_dict(), other.state_dict())


def test_a_scaler_that_is_off_leaves_the_gradient_gate_on():
    executor = LossExecutor(WEIGHTS)
    net, optimizer = ready(executor)
    before = everything(net, optimizer, executor)
    executor(terms(net, batch(4))).backward()
    next(net.parameters()).grad[0, 0] = math.nan
    assert not executor.step(optimizer, scaler=torch.amp.GradScaler("cpu", enabled=False)).applied
    assert same(before, everything(net, optimizer, executor))
