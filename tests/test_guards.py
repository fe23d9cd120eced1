"""Guards: laws over random weights and losses, and the spike gate on clean and dirty series."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptive_loss.guards import (
    Guards,
    bound_weights,
    cap_shares,
    first_bad_weight,
    first_non_finite,
    guard_weights,
    largest_norm,
    limit_rate,
)
from adaptive_loss.spike_gate import SpikeGate, spike_limits

positive = st.floats(1e-10, 1e10)
value = st.floats(-1e10, 1e10)


def vector(numbers) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


@st.composite
def shares_case(draw):
    n = draw(st.integers(1, 6))
    start = vector(draw(st.lists(positive, min_size=n, max_size=n)))
    gain = vector(draw(st.lists(st.floats(-9, 9), min_size=n, max_size=n))).exp()
    values = vector(draw(st.lists(st.one_of(value, st.just(0.0), st.just(math.nan)), min_size=n, max_size=n)))
    capped = torch.tensor(draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    return start * gain, start, values, capped, draw(st.floats(0.05, 1.0))


@settings(max_examples=150, deadline=None)
@given(shares_case())
def test_share_cap_laws(case):
    weights, start, values, capped, cap = case
    after = cap_shares(weights, start, values, capped, cap)
    mass = after * values.abs().nan_to_num(0.0)
    total = mass.sum()
    assert torch.equal(after[~capped], weights[~capped])
    assert (after <= weights * (1 + 1e-12)).all()
    assert (after >= torch.minimum(start, weights) * (1 - 1e-12)).all()
    if int((~values.isnan()).sum()) < 2:  # a term that is alone holds all of the total, whatever its weight
        assert torch.equal(after, weights)
        return
    raised = capped & (after > start * (1 + 1e-9))
    assert (mass[raised] <= cap * total * (1 + 1e-6)).all()


def test_share_cap_by_hand():
    # masses 1 | 9 with cap 0.5: the auxiliary may hold as much as the rest, so its weight falls from 9 to 1.
    after = cap_shares(vector([1, 9]), vector([1, 0.1]), vector([1, 1]), torch.tensor([False, True]), 0.5)
    assert after.tolist() == [1.0, 1.0]


def test_share_cap_leaves_start_weights_alone():
    start = vector([1, 100])
    assert torch.equal(cap_shares(start, start, vector([1, 1]), torch.tensor([False, True]), 0.5), start)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(positive, positive), min_size=1, max_size=5), st.floats(1e-3, 5))
def test_rate_limit_laws(pairs, rate):
    weights, last = vector([a for a, _ in pairs]), vector([b for _, b in pairs])
    after = limit_rate(weights, last, rate)
    assert ((after / last).log().abs() <= rate * (1 + 1e-9)).all()
    near = (weights / last).log().abs() < rate * (1 - 1e-9)
    torch.testing.assert_close(after[near], weights[near], rtol=1e-12, atol=0)
    assert torch.equal(limit_rate(last, last, rate), last)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1e30), positive), min_size=1, max_size=5))
def test_bounds_laws(pairs):
    weights, start = vector([a for a, _ in pairs]), vector([b for _, b in pairs])
    after = bound_weights(weights, start, (1e-3, 1e3))
    within = (after >= start.clamp(max=1e-3)) & (after <= start.clamp(min=1e3))
    assert (within | ((weights == 0) & (after == 0))).all()  # a 0 is no small weight: the term waits
    assert torch.equal(bound_weights(start, start, (1e-3, 1e3)), start)  # a start weight is never out of bounds
    assert bound_weights(vector([5.0]), vector([0.0]), (1e-3, 1e3)).tolist() == [0.0]


def test_guards_apply_in_order_and_can_be_off():
    start, values, capped = vector([1, 1]), vector([1, 1]), torch.tensor([False, True])
    names = [name for name, _ in guard_weights(Guards(), start, start, start, values, capped)]
    assert names == ["bounds", "rate limit", "share cap"]
    off = Guards(rate_limit=None, share_cap=None)
    assert [name for name, _ in guard_weights(off, start, start, start, values, capped)] == ["bounds"]


@pytest.mark.parametrize(
    "kwargs",
    [
        {"bounds": (0.0, 1.0)},
        {"bounds": (2.0, 1.0)},
        {"bounds": (math.nan, 1.0)},
        {"share_cap": 0.0},
        {"share_cap": 1.1},
        {"share_cap": math.nan},
        {"rate_limit": -1.0},
        {"rate_limit": math.nan},
        {"clip_norm": 0.0},
        {"max_rejections": 0},
        {"spike_window": 3},
    ],
)
def test_bad_settings(kwargs):
    with pytest.raises(ValueError, match=r"Guards\." + next(iter(kwargs))):
        Guards(**kwargs)


def test_first_bad():
    present = torch.tensor([False, True, True])
    assert first_non_finite(vector([math.nan, 1, math.inf]), present) == 2
    assert first_non_finite(vector([math.nan, 1, 2]), present) is None
    assert first_bad_weight(vector([math.nan, 0, 1]), present) is None
    assert first_bad_weight(vector([1, 1, -1e-9]), present) == 2


def test_norm_overflow_is_told_from_a_gradient_that_is_not_finite():
    huge = torch.full((4,), 3e38)
    assert largest_norm([huge], float(huge.norm())) == pytest.approx(6e38, rel=1e-6)
    assert largest_norm([torch.tensor([math.nan])], math.nan) != largest_norm([torch.tensor([1.0])], 1.0)
    assert math.isnan(largest_norm([torch.tensor([math.nan])], math.nan))
    half = torch.full((4,), 6e4, dtype=torch.float16)
    assert largest_norm([half], math.inf) == pytest.approx(2 * float(half[0]))


# ---- spike gate ---------------------------------------------------------------------------------------------------


def run_gate(series: torch.Tensor, size: int = 64) -> tuple[int, SpikeGate]:
    """Feed [T, K]; how many values were called spikes."""
    gate = SpikeGate(series.shape[1], size)
    spikes = 0
    everywhere = torch.ones(series.shape[1], dtype=torch.bool)
    for values in series:
        over = values > gate.limits
        assert (gate.worst(values, everywhere) is None) == (not over.any())
        spikes += int(over.sum())
        gate.admit(torch.where(over, math.nan, values))
    return spikes, gate


def clean(name: str) -> torch.Tensor:
    dice = torch.Generator().manual_seed(0)
    uniform = torch.rand(400, 250, generator=dice, dtype=torch.float64)
    normal = torch.randn(400, 250, generator=dice, dtype=torch.float64)
    if name == "lognormal":
        return (2 * normal).exp()
    if name == "narrow lognormal":
        return (0.3 * normal).exp()
    if name == "pareto":
        return uniform ** (-1 / 1.5)
    if name == "student t2":  # t with two degrees of freedom by inversion
        a = 2 * uniform - 1
        return a * (2 / (1 - a**2)).sqrt()
    if name == "student t3, all positive":
        chi = torch.randn(3, 400, 250, generator=dice, dtype=torch.float64).square().sum(0)
        return 10 + normal / (chi / 3).sqrt()
    if name == "falling":
        return (normal * 0.1).exp() * torch.linspace(0, -12, 400, dtype=torch.float64).exp()[:, None]
    return (normal * 0.1).exp() * torch.linspace(0, 12, 400, dtype=torch.float64).exp()[:, None]


@pytest.mark.parametrize(
    "name",
    [
        "lognormal",
        "narrow lognormal",
        "pareto",
        "student t2",
        "student t3, all positive",
        "falling",
        "rising",
    ],
)
def test_spike_gate_lets_clean_heavy_tails_pass(name):
    series = clean(name)
    spikes, _ = run_gate(series)
    assert spikes <= 1e-3 * series.numel()  # 1e5 values each


def test_spike_gate_never_admits_and_recovers_at_once():
    gate = SpikeGate(2, 64)
    both = torch.tensor([True, True])
    for step in range(200):
        assert gate.worst(vector([1.0 + 0.01 * (step % 7), 5.0]), both) is None
        gate.admit(vector([1.0 + 0.01 * (step % 7), 5.0]))
    for _ in range(50):  # a rejected value is never admitted, so the gate does not get used to it
        assert gate.worst(vector([1.0, 500.0]), both) == 1
        assert gate.worst(vector([1.0, 5.0]), both) is None
    assert gate.worst(vector([1e4, 500.0]), both) == 0  # the farther one is named
    assert gate.worst(vector([1e4, 5.0]), torch.tensor([False, True])) is None


def test_a_loss_that_grows_is_no_spike_however_far_it_comes():
    """A KL that left a collapse rose a hundredfold within a window, and the run was ended."""
    gate, value = SpikeGate(1, 64), torch.full((1,), 0.02, dtype=torch.float64)
    everywhere = torch.ones(1, dtype=torch.bool)
    for _ in range(64):
        gate.admit(value)
    for _ in range(50):
        value = 1.3 * value
        assert gate.worst(value, everywhere) is None
        gate.admit(value)
    assert float(value) > 1000 * 0.02
    for _ in range(64):
        gate.admit(value)
    assert gate.worst(10 * value, everywhere) == 0


def test_spike_limits_by_hand():
    # window of 16 ones: m = 1, median asinh(1), MAD 0, so the limit is sinh(asinh(1) + 2).
    limit = math.sinh(math.asinh(1) + 2)
    assert spike_limits(torch.ones(16, 1, dtype=torch.float64)).item() == pytest.approx(limit, rel=1e-12)
    negative = spike_limits(-torch.ones(16, 1, dtype=torch.float64)).item()
    assert negative == pytest.approx(math.sinh(2 - math.asinh(1)), rel=1e-12)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(0.1, 10), min_size=16, max_size=16), st.floats(1e-6, 1e6))
def test_spike_limits_scale_with_the_loss(numbers, factor):
    window = vector(numbers)[:, None]
    torch.testing.assert_close(spike_limits(window * factor), spike_limits(window) * factor, rtol=1e-6, atol=0)


def test_spike_gate_is_silent_where_it_cannot_tell():
    gate = SpikeGate(3, 64)
    everywhere = torch.ones(3, dtype=torch.bool)
    for step in range(64):  # a silent hinge, a term that is rarely there, a constant
        gate.admit(vector([0.0, 1.0 if step % 8 == 0 else math.nan, 2.0]))
    assert gate.limits[:2].tolist() == [math.inf, math.inf]
    assert gate.worst(vector([3.0, 1e9, 2.0]), everywhere) is None
    for _ in range(64):  # sixteen values there are: now the rare one has a history, whatever the gaps
        gate.admit(vector([0.0, 1.0, 2.0]))
    assert gate.worst(vector([3.0, 1e9, 2.0]), everywhere) == 1


def test_spike_gate_continues_from_its_state():
    dice = torch.Generator().manual_seed(3)
    series = torch.randn(61, 3, generator=dice, dtype=torch.float64).exp()
    _, gate = run_gate(series[:37])
    copy = SpikeGate(3, 64)
    copy.load_state_dict(gate.state_dict())
    for values in series[37:]:
        gate.admit(values), copy.admit(values)
    assert all(
        torch.equal(gate.state_dict()[k].nan_to_num(), copy.state_dict()[k].nan_to_num()) for k in ("window", "limits")
    )
    assert gate.last() == copy.last() == series[-1].tolist()
