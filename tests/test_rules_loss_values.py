"""The rules that use loss values alone: golden values, laws, degenerate inputs, missing terms, and resuming."""

import io
import math
from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from torch import Tensor, nn

from adaptive_loss import LossExecutor
from adaptive_loss.guards import Guards
from adaptive_loss.losses import Terms
from adaptive_loss.seeding import own_generator
from adaptive_loss.signals import Signals
from adaptive_loss.weighting.base import Context, Weighting
from adaptive_loss.weighting.dwa import DWA
from adaptive_loss.weighting.equal import Equal, equal_weights
from adaptive_loss.weighting.famo import FAMO, famo_gradient, famo_logs, famo_weights
from adaptive_loss.weighting.gls import GLS, gls_weights
from adaptive_loss.weighting.imtl_l import IMTLL, imtl_l_weights
from adaptive_loss.weighting.inverse_ema import InverseEMA, inverse_weights
from adaptive_loss.weighting.relobralo import ReLoBRaLo, relobralo_balance, relobralo_step
from adaptive_loss.weighting.rlw import RLW, rlw_weights
from adaptive_loss.weighting.softadapt import SoftAdapt, softadapt_weights, window_sizes, window_slopes
from adaptive_loss.weighting.softadapt_loss_weighted import SoftAdaptLossWeighted
from adaptive_loss.weighting.stch import STCH, stch_log_weights, stch_weights
from adaptive_loss.weighting.uncertainty import Uncertainty

NAN = math.nan
RULES: dict[str, Callable[[int], Weighting]] = {
    "equal": Equal,
    "rlw": RLW,
    "gls": GLS,
    "imtl_l": IMTLL,
    "softadapt": lambda k: SoftAdapt(k, beta=2.0, span=3),
    "softadapt_loss_weighted": lambda k: SoftAdaptLossWeighted(k, beta=-0.5),
    "relobralo": lambda k: ReLoBRaLo(k, alpha=0.7, beta=0.6),
    "famo": lambda k: FAMO(k, least=-0.1),
    "stch": lambda k: STCH(k, mu=0.3),
    "stch, measured nadir": lambda k: STCH(k, log=True, mu=0.7, warm_up=1),
    "stch, given nadir": lambda k: STCH(k, log=True, nadir=[2.0] * k),
    "inverse_ema": lambda k: InverseEMA(k, decay=0.8),
}
SUM_TO_ONE = ["rlw", "softadapt", "softadapt_loss_weighted", "famo"]
every_rule = pytest.mark.parametrize("name", RULES)


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def same(one: Tensor, other: Tensor) -> bool:
    """Bit-equal, where NaN is NaN."""
    return bool(((one == other) | (one.isnan() & other.isnan())).all())


def live(value: float) -> Tensor:
    return torch.tensor(value, requires_grad=True, dtype=torch.float64)


def context(losses: Tensor, start: Tensor | None = None) -> Context:
    start = torch.ones_like(losses) if start is None else start
    return Context(0, ~torch.isnan(losses), Signals(len(losses), None), start, start)


def feed(rule: Weighting, *steps: Sequence[float], start: Tensor | None = None) -> Tensor:
    """The weights of the last step; all but it are accepted."""
    for i, values in enumerate(steps):
        losses = doubles(*values)
        if i == len(steps) - 1:
            return rule(losses, context(losses, start)).detach()
        rule.after_step(losses, context(losses, start))
    raise AssertionError


class Net:
    """Three losses of two parameters, under one rule; ``a`` misses some steps and ``off`` is off."""

    def __init__(self, name: str, seed: int = 0) -> None:
        self.executor = LossExecutor({"a": 1.0, "b": 0.5, "off": 0.0, "c": 2.0}, weighting=RULES[name](4), seed=seed)
        self.p = nn.Parameter(doubles(1.0, -2.0))
        self.optimizer = torch.optim.Adam([self.p, *self.executor.parameters()], lr=0.05)

    def losses(self, step: int) -> dict[str, Tensor]:
        x, y = self.p
        terms = {"a": (x - 2) ** 2 + 0.1, "b": 3 * (x + y) ** 2 + 0.2, "off": x * 0 - 7, "c": (y - step % 3) ** 2 + 1.5}
        return {name: loss for name, loss in terms.items() if name != "a" or step % 4}

    def step(self, step: int) -> tuple[Tensor, Mapping[str, float]]:
        self.optimizer.zero_grad()
        self.executor(self.losses(step)).backward()
        assert self.p.grad is not None
        gradient = self.p.grad.clone()
        record = self.executor.step(self.optimizer)
        assert record.applied
        if step % 5 == 4:
            self.executor.end_epoch()
        return gradient, record.weights


# ---- laws of every rule ---------------------------------------------------------------------------------------


@every_rule
def test_the_gradient_is_that_of_the_reported_weights(name):
    net = Net(name)
    for step in range(12):
        losses = net.losses(step)
        parts = {n: torch.autograd.grad(loss, net.p, retain_graph=True)[0] for n, loss in losses.items()}
        gradient, weights = net.step(step)
        assert torch.allclose(gradient, sum(weights[n] * part for n, part in parts.items()), rtol=1e-12, atol=1e-12)


@every_rule
def test_saved_loaded_and_continued_is_bit_equal(name):
    net = Net(name, seed=3)
    for step in range(7):
        net.step(step)
    file = io.BytesIO()
    torch.save([net.executor.state_dict(), net.optimizer.state_dict(), net.p.detach()], file)
    straight = [net.step(step) for step in range(7, 20)]
    file.seek(0)
    executor, optimizer, p = torch.load(file, weights_only=True)
    twin = Net(name, seed=99)  # draws must come from the state, not from the seed
    twin.executor.load_state_dict(executor)
    twin.optimizer.load_state_dict(optimizer)
    with torch.no_grad():
        twin.p.copy_(p)
    for (gradient, weights), step in zip(straight, range(7, 20), strict=True):
        again, reported = twin.step(step)
        assert torch.equal(gradient, again) and weights == reported
    assert torch.equal(net.p, twin.p)


@every_rule
def test_a_saved_state_is_not_shared_with_the_live_one(name):
    rule = RULES[name](3)
    feed(rule, (1.0, 2.0, 3.0), (1.5, 1.0, 4.0))
    state = {key: (value, value.clone()) for key, value in rule.state_dict().items()}
    feed(rule, (2.0, 1.0, 1.0), (0.5, 2.0, 3.0), (1.0, 1.0, 1.0))
    rule.end_epoch({})
    assert all(same(value, before) for value, before in state.values())


@every_rule
def test_forward_changes_nothing(name):
    rule = RULES[name](3)
    feed(rule, (1.0, 2.0, 3.0), (1.5, 1.0, 4.0))
    before = {key: value.clone() for key, value in rule.state_dict().items()}
    first, again = (feed(rule, (9.0, 0.5, 2.0)) for _ in range(2))
    assert torch.equal(first, again)
    assert all(same(value, before[key]) for key, value in rule.state_dict().items())


@every_rule
def test_the_order_of_the_terms_does_not_matter(name):
    if name == "rlw":
        pytest.skip("the draws belong to places")
    order = [2, 0, 1]
    steps = [(1.0, 2.0, 3.0), (0.5, 2.5, 3.0), (0.7, NAN, 2.0), (0.6, 1.0, 2.5)]
    straight, turned = RULES[name](3), RULES[name](3)
    for rule in (straight, turned):
        rule.bind(Terms({"a": 1.0, "b": 1.0, "c": 1.0}), 5)
    expected = feed(straight, *steps)[order]
    assert torch.allclose(feed(turned, *[[values[i] for i in order] for values in steps]), expected, rtol=1e-12)


@every_rule
@pytest.mark.parametrize("k", [1, 2, 1000])
@pytest.mark.parametrize(
    "value",
    [0.0, -1.0, 1.0, 1e10, 1e-10, 1e300, 5e-324],
)
def test_weights_are_finite_whatever_the_losses(name, k, value):
    rule = RULES[name](k)
    mixed = [value if i % 2 == 0 else 1.0 for i in range(k)]
    for values in [[1.0] * k, [value] * k, mixed, [value] * k, mixed]:
        weights = feed(rule, values, values)
        assert weights.shape == (k,) and torch.isfinite(weights).all() and (weights >= 0).all()
        rule.end_epoch({})


@every_rule
def test_terms_that_are_absent_poison_nothing(name):
    rule, without = RULES[name](3), RULES[name](2)
    steps = [(1.0, 2.0), (0.5, 2.5), (0.7, 2.0), (0.6, 1.0)]
    left = feed(rule, *[(a, NAN, b) for a, b in steps])
    assert torch.isfinite(left).all() and (left > 0).all()
    if name not in ("rlw", "relobralo"):
        assert torch.allclose(left[[0, 2]], feed(without, *steps), rtol=1e-12)
    back = feed(rule, (0.6, 1.0, 1.0), (0.5, 1.2, 1.1), (0.4, 1.0, 1.0))
    assert torch.isfinite(back).all() and (back > 0).all()
    assert torch.isfinite(feed(rule, (NAN, 3.0, NAN), (NAN, NAN, 1.0))).all()


@pytest.mark.parametrize("name", SUM_TO_ONE)
def test_weights_that_sum_to_one(name):
    steps = [(1.0, 2.0, 3.0, 0.1), (0.5, 2.5, 3.0, 0.2), (0.7, NAN, 2.0, 0.1), (NAN, 1.0, 2.5, 0.3)]
    for end in range(1, 5):
        there = ~torch.isnan(doubles(*steps[end - 1]))
        assert feed(RULES[name](4), *steps[:end])[there].sum().item() == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("name", ["relobralo", "famo, no bound", "gls", "stch, measured nadir"])
def test_the_unit_of_a_term_does_not_matter(name):
    # Of these rules wᵢLᵢ is the same in any unit, up to a factor that all weights share.
    make = {**RULES, "famo, no bound": FAMO}[name]
    steps = [(1.0, 2.0, 3.0), (0.5, 2.5, 3.0), (0.7, 1.0, 2.0), (0.6, 1.0, 2.5)]
    unit = doubles(1.0, 100.0, 0.01)
    rules = make(3), make(3)
    one, other = (
        feed(rule, *[(doubles(*values) * scale).tolist() for values in steps])
        for rule, scale in zip(rules, (torch.ones(3), unit), strict=True)
    )
    parts = (one, other) if name == "relobralo" else (one * doubles(*steps[-1]), other * doubles(*steps[-1]) * unit)
    # FAMO's 1e−8 is not in the unit.
    assert torch.allclose(parts[0] / parts[0].sum(), parts[1] / parts[1].sum(), rtol=1e-5)


# ---- equal ----------------------------------------------------------------------------------------------------


def test_equal_by_hand():
    # The mean of 1, 3 and 5 is 3; the term that is off counts for nothing and stays off.
    executor = LossExecutor({"a": 1.0, "b": 3.0, "off": 0.0, "c": 5.0}, weighting="equal")
    total = executor({"a": live(1.0), "b": live(2.0), "off": live(9.0), "c": live(4.0)})
    assert executor.weights == pytest.approx({"a": 3.0, "b": 3.0, "off": 0.0, "c": 3.0}, rel=1e-12)
    assert total.item() == pytest.approx(21.0)
    assert equal_weights(doubles(1.0, 3.0, 0.0, 5.0)).tolist() == pytest.approx([3.0, 1.0, 1.0, 0.6])


def test_equal_is_fixed_where_the_start_weights_are_equal():
    assert torch.equal(feed(Equal(3), (5.0, NAN, -1.0), start=doubles(0.3, 0.3, 0.3)), torch.ones(3).double())


# ---- random ---------------------------------------------------------------------------------------------------


def test_rlw_by_hand():
    assert rlw_weights(doubles(0.0, math.log(3))).tolist() == pytest.approx([0.25, 0.75])


def test_rlw_draws_from_its_own_generator():
    net = LossExecutor({"a": 1.0, "b": 1.0, "c": 1.0}, weighting="rlw", seed=7)
    own, optimizer = own_generator(7, "rlw"), torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.0)
    for _ in range(3):
        torch.rand(5)  # others' draws shift nothing
        expected = torch.softmax(torch.randn(3, generator=own, dtype=torch.float64), 0)
        net({"a": live(1.0), "b": live(2.0), "c": live(3.0)}).backward()
        assert list(net.step(optimizer).weights.values()) == pytest.approx(expected.tolist(), rel=1e-12)


def test_rlw_keeps_its_draw_over_a_rejected_step():
    executor = LossExecutor({"a": 1.0, "b": 1.0}, weighting="rlw")
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.0)
    executor({"a": live(1.0), "b": live(1.0)})
    first = executor.weights
    executor({"a": live(NAN), "b": live(1.0)}).backward()
    assert not executor.step(optimizer).applied
    executor({"a": live(1.0), "b": live(1.0)}).backward()
    assert executor.step(optimizer).weights == first


def test_rlw_is_even_on_average():
    # By symmetry the mean is 1/K; one weight's standard deviation is below ¼, so the mean's is below .25/√4000.
    rule = RLW(3)
    seen = []
    for _ in range(4000):
        seen.append(feed(rule, (1.0, 1.0, 1.0)))
        feed(rule, (1.0, 1.0, 1.0), (1.0, 1.0, 1.0))
    assert torch.allclose(torch.stack(seen).mean(0), torch.full((3,), 1 / 3).double(), atol=0.02)


# ---- geometric ------------------------------------------------------------------------------------------------


def test_gls_by_hand():
    # GLS = (1·8·27)^⅓ = 6, so w = 6/(3·L) = 2/L.
    assert gls_weights(doubles(1.0, 8.0, 27.0)).tolist() == pytest.approx([2.0, 0.25, 2 / 27])


def test_gls_is_the_geometric_mean_in_value_and_gradient():
    values, executor = [1.7, 0.02, 430.0], LossExecutor({"a": 1.0, "b": 1.0, "c": 1.0}, weighting="gls")
    losses, twins = [live(v) for v in values], [live(v) for v in values]
    total = executor(dict(zip("abc", losses, strict=True)))
    total.backward()
    mean = torch.stack(twins).prod() ** (1 / 3)
    mean.backward()
    assert total.item() == pytest.approx(mean.item(), rel=1e-12)
    assert [x.grad.item() for x in losses] == pytest.approx([x.grad.item() for x in twins], rel=1e-12)


def test_gls_leaves_out_what_is_not_positive():
    # (1·4)^½ = 2 over the two positive terms.
    assert feed(GLS(4), (1.0, 0.0, 4.0, -3.0)).tolist() == pytest.approx([1.0, 1.0, 0.25, 1.0])


def test_gls_scales_by_the_mean_of_start_weights():
    # A start weight of 16 multiplies the total by 16^½.
    one, other = (LossExecutor({"a": 1.0, "b": b}, weighting="gls") for b in (1.0, 16.0))
    totals = [e({"a": live(2.0), "b": live(8.0)}).item() for e in (one, other)]
    assert totals == pytest.approx([4.0, 16.0])


# ---- learned scales -------------------------------------------------------------------------------------------


def test_imtl_l_in_closed_form():
    # total = Σ exp(sᵢ)Lᵢ − sᵢ, so ∂/∂sᵢ = exp(sᵢ)Lᵢ − 1.
    executor = LossExecutor({"a": 1.0, "b": 2.0}, weighting="imtl_l")
    s = executor.weighting.log_scale
    with torch.no_grad():
        s.copy_(torch.tensor([0.3, -0.7]))
    total = executor({"a": live(2.0), "b": live(2.0)})
    total.backward()
    a, b = 2.0 * math.exp(0.3), 4.0 * math.exp(-0.7)
    assert total.item() == pytest.approx(a + b - 0.3 + 0.7, rel=1e-6)
    assert s.grad.tolist() == pytest.approx([a - 1, b - 1], rel=1e-6)


def test_imtl_l_makes_every_term_add_one():
    executor = LossExecutor({"a": 1.0, "b": 1.0}, weighting="imtl_l")
    optimizer = torch.optim.SGD(executor.parameters(), lr=0.2)
    for _ in range(300):
        optimizer.zero_grad()
        executor({"a": live(3.0), "b": live(0.2)}).backward()
        executor.step(optimizer)
    assert executor.weights == pytest.approx({"a": 1 / 3, "b": 5.0}, rel=1e-3)


def test_imtl_l_leaves_an_absent_term_alone():
    executor = LossExecutor({"a": 1.0, "b": 1.0, "off": 0.0}, weighting="imtl_l")
    executor({"a": live(3.0)}).backward()
    assert executor.weighting.log_scale.grad.tolist() == pytest.approx([2.0, 0.0, 0.0])


def test_imtl_l_neither_overflows_nor_gets_stuck():
    # The published form overflows where a loss stays at 0: its gradient on s is −1 for ever.
    executor = LossExecutor({"a": 1.0}, weighting=IMTLL(1, bound=2.0))
    optimizer = torch.optim.SGD(executor.parameters(), lr=0.5)
    for value, expected in [(0.0, math.exp(2)), (4.0, 0.25)]:
        for _ in range(60):
            optimizer.zero_grad()
            executor({"a": live(value)}).backward()
            executor.step(optimizer)
        assert executor.weights["a"] == pytest.approx(expected, rel=1e-3)
    assert imtl_l_weights(torch.tensor([1e9, -1e9]), 2.0).tolist() == pytest.approx([math.exp(2), math.exp(-2)])


@pytest.mark.parametrize("bound", [0.0, -1.0, math.inf, NAN])
def test_imtl_l_refuses_a_bound(bound):
    with pytest.raises(ValueError, match="bound"):
        IMTLL(2, bound=bound)


# ---- slopes ---------------------------------------------------------------------------------------------------


def test_softadapt_over_steps():
    # Window of 2 steps: slopes (4 − 1)/2 and 0, so w = softmax(2·1.5, 0); the oldest value has left the window.
    weights = feed(SoftAdapt(2, beta=2.0, span=2), (9.0, 3.0), (1.0, 3.0), (2.0, 3.0), (4.0, 3.0), (100.0, 0.0))
    assert weights.tolist() == pytest.approx([1 / (1 + math.exp(-3)), 1 / (1 + math.exp(3))])


def test_softadapt_loss_weighted_over_steps():
    # Means 7/3 and 3 over the same window: w ∝ (7/3·e³, 3).
    steps = [(1.0, 3.0), (2.0, 3.0), (4.0, 3.0), (100.0, 0.0)]
    a, b = 7 / 3 * math.exp(3), 3.0
    for rule in (SoftAdapt(2, beta=2.0, span=2, loss_weighted=True), SoftAdaptLossWeighted(2, 2.0, 2)):
        assert feed(rule, *steps).tolist() == pytest.approx([a / (a + b), b / (a + b)])


def test_softadapt_is_even_before_two_values():
    assert feed(SoftAdapt(2), (1.0, 5.0), (2.0, 7.0)).tolist() == [0.5, 0.5]
    assert feed(SoftAdaptLossWeighted(2), (1.0, 5.0)).tolist() == [0.5, 0.5]


def test_softadapt_slopes_of_terms_with_gaps():
    past = torch.stack([doubles(NAN, 1.0, NAN), doubles(2.0, 2.0, NAN), doubles(5.0, 6.0, 3.0)])
    assert window_slopes(past).tolist() == [3.0, 2.5, 0.0]
    # A term without history counts as the others do on average.
    assert window_sizes(torch.stack([doubles(NAN, -1.0), doubles(NAN, -3.0)])).tolist() == [2.0, 2.0]
    rule = SoftAdapt(2, span=2)
    for values in [(1.0, 5.0), (2.0, NAN), (4.0, 6.0)]:
        losses = doubles(*values)
        rule.after_step(losses, context(losses))
    assert window_slopes(rule.past).tolist() == [1.5, 1.0]


def test_softadapt_in_another_unit_is_another_beta():
    slopes = doubles(0.3, -0.2, 1.0)
    assert torch.allclose(softadapt_weights(10 * slopes, 0.1), softadapt_weights(slopes, 1.0))
    assert softadapt_weights(slopes, 0.0).tolist() == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize("arguments", [{"span": 0}, {"beta": NAN}, {"beta": math.inf}])
def test_softadapt_refuses(arguments):
    with pytest.raises(ValueError, match="SoftAdapt"):
        SoftAdapt(2, **arguments)


# ---- lookback -------------------------------------------------------------------------------------------------

LOW, HIGH = 2 / (1 + math.exp(0.5)), 2 / (1 + math.exp(-0.5))
"""2·softmax(½, 1)."""


def test_relobralo_by_hand_without_lookback():
    # t = 1: ratios to the last step (½, 1); t = 2: (1, ½). ρ = 1 and α = ½ average them with λ(t−1).
    rule = ReLoBRaLo(2, alpha=0.5, beta=1.0)
    steps = [(2.0, 4.0), (1.0, 4.0), (1.0, 2.0)]
    first = [(1 + LOW) / 2, (1 + HIGH) / 2]
    assert feed(rule, *steps[:1]).tolist() == [1.0, 1.0]
    assert feed(rule, *steps[:2]).tolist() == pytest.approx(first)
    rule = ReLoBRaLo(2, alpha=0.5, beta=1.0)
    assert feed(rule, *steps).tolist() == pytest.approx([(first[0] + HIGH) / 2, (first[1] + LOW) / 2])


def test_relobralo_by_hand_with_lookback():
    # ρ = 0: at t = 2 both terms stand at half of their first value, so λ̂(2; 0) = (1, 1).
    rule = ReLoBRaLo(2, alpha=0.5, beta=0.0)
    assert feed(rule, (2.0, 4.0), (1.0, 4.0), (1.0, 2.0)).tolist() == pytest.approx([(1 + HIGH) / 2, (1 + LOW) / 2])


def test_relobralo_mixes_as_written():
    mixed = relobralo_step(doubles(1.0), doubles(2.0), doubles(3.0), 1.0, 0.9)
    looked = relobralo_step(doubles(1.0), doubles(2.0), doubles(3.0), 0.0, 0.9)
    assert (mixed.item(), looked.item()) == pytest.approx((0.9 + 0.3, 1.8 + 0.3))


def test_relobralo_survives_a_previous_loss_of_zero():
    # Public code divides by the previous loss and gives inf here.
    assert relobralo_balance(doubles(1.0, 2.0), doubles(0.0, 4.0), 1.0).tolist() == pytest.approx([HIGH, LOW])
    assert relobralo_balance(doubles(0.0, 0.0), doubles(0.0, 0.0), 1.0).tolist() == [1.0, 1.0]
    assert torch.isfinite(feed(ReLoBRaLo(2), (0.0, 1.0), (1.0, 1.0), (1e10, 0.0), (1.0, 1.0))).all()


def test_relobralo_sums_to_the_number_of_terms():
    rule = ReLoBRaLo(3, alpha=0.6, beta=0.5, temperature=0.1)
    dice = torch.Generator().manual_seed(0)
    for _ in range(50):
        values = torch.rand(3, generator=dice).add(0.1).tolist()
        assert feed(rule, values).sum().item() == pytest.approx(3, rel=1e-12)
        feed(rule, values, values)


def test_relobralo_compares_a_late_term_with_its_own_first_step():
    # At t = 2 the late term stands at ¼ of the value at t = 1, its first; the other at ¼ of the one at t = 0.
    rule = ReLoBRaLo(2, alpha=1.0, beta=0.0)
    assert feed(rule, (4.0, NAN), (2.0, 8.0), (1.0, 2.0)).tolist() == pytest.approx([1.0, 1.0])


def test_relobralo_looks_back_as_often_as_it_says():
    rule, kept = ReLoBRaLo(1, beta=0.3), 0.0
    for _ in range(2000):
        kept += float(rule.keep)
        feed(rule, (1.0,), (1.0,))
    assert kept / 2000 == pytest.approx(0.3, abs=0.05)  # five standard deviations


@pytest.mark.parametrize("arguments", [{"alpha": 1.1}, {"beta": -0.1}, {"temperature": 0.0}, {"alpha": NAN}])
def test_relobralo_refuses(arguments):
    with pytest.raises(ValueError, match="ReLoBRaLo"):
        ReLoBRaLo(2, **arguments)


# ---- FAMO -----------------------------------------------------------------------------------------------------


def test_famo_by_hand():
    # z = (½, ½), D = (1, 4): w ∝ (1, ¼).
    assert feed(FAMO(2), (1.0, 4.0)).tolist() == pytest.approx([0.8, 0.2], rel=1e-7)
    # The first loss halves, so d = ½·(ln 2 − ½ ln 2)·(1, −1) and Adam's first step is −.025·sign(d).
    moved = feed(FAMO(2), (1.0, 4.0), (0.5, 4.0), (0.5, 4.0))
    a, b = math.exp(-0.025) / 0.5, math.exp(0.025) / 4
    assert moved.tolist() == pytest.approx([a / (a + b), b / (a + b)], rel=1e-6)


def test_famo_weights_are_the_gradient_of_its_objective():
    logits, least = doubles(0.3, -0.5, 0.1), doubles(0.0, 0.2, -1.0)
    losses = doubles(0.7, 30.0, 2.0).requires_grad_()
    shares, above = torch.softmax(logits, 0), losses - least + 1e-8
    (shares * above.log()).sum().div((shares / above).sum().detach()).backward()
    ours = famo_weights(famo_logs(losses.detach(), least), logits)
    assert torch.allclose(ours, losses.grad, rtol=1e-12)


def test_famo_gradient_is_the_product_with_the_softmax_jacobian():
    logits, fall = doubles(0.3, -0.5, 0.1).requires_grad_(), doubles(0.2, -0.1, 0.4)
    (expected,) = torch.autograd.grad(torch.softmax(logits, 0), logits, fall)
    assert torch.allclose(famo_gradient(fall, logits.detach()), expected, rtol=1e-12)


def test_famo_moves_as_adam_does():
    rule, xi = FAMO(3), nn.Parameter(torch.zeros(3, dtype=torch.float64))
    adam = torch.optim.Adam([xi], lr=0.025, weight_decay=1e-3)
    dice, last = torch.Generator().manual_seed(1), None
    for _ in range(30):
        losses = torch.rand(3, generator=dice, dtype=torch.float64) + 0.1
        rule.after_step(losses, context(losses))
        if last is not None:
            fall = (last + 1e-8).log() - (losses + 1e-8).log()
            xi.grad = torch.autograd.grad(torch.softmax(xi, 0), xi, fall)[0]
            adam.step()
        last = losses
    assert torch.allclose(rule.logits, xi.detach(), rtol=1e-12)
    assert not list(rule.parameters())


def test_famo_favours_the_term_that_falls_least():
    steps = [(2.0 * 0.9**i, 2.0 * 0.99**i) for i in range(40)]
    rule = FAMO(2)
    feed(rule, *steps)
    assert rule.logits[1] > 0.2 > rule.logits[0]


def test_famo_takes_bounds_in_the_losses_own_units():
    # startᵢ·(Lᵢ − bᵢ) = 1 and 4.
    rule = FAMO(2, least=[1.0, 2.0])
    assert feed(rule, (10 * 1.1, 4.0), start=doubles(10.0, 1.0)).tolist() == pytest.approx([2 / 3, 1 / 3], rel=1e-6)


def test_famo_leaves_out_what_has_no_logarithm_and_rests_what_is_absent():
    assert feed(FAMO(3), (1.0, 0.0, 4.0)).tolist() == pytest.approx([0.8, 1.0, 0.2], rel=1e-6)
    rule = FAMO(3)
    feed(rule, (1.0, 1.0, 1.0), (0.5, 2.0, 1.0), (1.0, 1.0, 1.0))
    before = rule.logits.clone()
    feed(rule, (0.3, 4.0, NAN), (1.0, 1.0, 1.0))
    assert rule.logits[2] == before[2] and (rule.logits[:2] != before[:2]).all()


@pytest.mark.parametrize("arguments", [{"least": NAN}, {"least": [0.0, 0.0]}, {"rate": -1.0}, {"weight_decay": NAN}])
def test_famo_refuses(arguments):
    with pytest.raises(ValueError, match="FAMO"):
        FAMO(3, **arguments)


# ---- smooth maximum -------------------------------------------------------------------------------------------


def test_stch_by_hand():
    # λ = (½, ½), μ = 1: softmax(½, 3/2)/2.
    assert feed(STCH(2), (1.0, 3.0)).tolist() == pytest.approx([0.5 / (1 + math.e), 0.5 / (1 + 1 / math.e)])
    # Normalized to n, the losses are 1 and 3: w = 2·(¼, ¾)/L.
    assert feed(STCH(2, log=True, nadir=[1.0, 2.0]), (1.0, 6.0)).tolist() == pytest.approx([0.5, 0.25])


def test_stch_weights_are_the_gradients_of_its_objectives():
    losses, mu = doubles(0.7, 3.0, 2.0).requires_grad_(), 0.4
    preference, ideal, nadir = doubles(0.2, 0.5, 0.3), doubles(0.1, 0.0, -1.0), doubles(1.0, 2.0, 5.0)
    linear = mu * torch.logsumexp(preference * (losses - ideal) / mu, 0)
    logarithmic = 3 * mu * torch.logsumexp((losses / nadir).log() / mu, 0)
    for value, ours in [
        (linear, stch_weights(losses.detach() - ideal, preference, mu)),
        (logarithmic, stch_log_weights(losses.detach(), nadir, mu)),
    ]:
        assert torch.allclose(ours, torch.autograd.grad(value, losses)[0], rtol=1e-12)
    rule = STCH(3, mu=mu, preference=[2.0, 5.0, 3.0], ideal=ideal.tolist())
    expected = stch_weights(losses.detach() - ideal, preference, mu)
    assert torch.allclose(feed(rule, losses.tolist()), expected, rtol=1e-12)


def test_stch_nears_the_maximum_and_the_mean():
    losses = (1.0, 3.0, 2.0)
    assert feed(STCH(3, mu=1e-3), losses).tolist() == pytest.approx([0.0, 1 / 3, 0.0], abs=1e-12)
    assert feed(STCH(3, mu=1e6), losses).tolist() == pytest.approx([1 / 9] * 3, rel=1e-5)


def test_stch_takes_vectors_in_the_losses_own_units():
    start = doubles(10.0, 1.0)
    shifted = feed(STCH(2, ideal=[0.1, 1.0]), (2.0, 3.0), start=start)
    assert torch.allclose(shifted, feed(STCH(2), (1.0, 2.0)))
    nadir = feed(STCH(2, log=True, nadir=[0.1, 1.0]), (2.0, 3.0), start=start)
    assert torch.allclose(nadir, feed(STCH(2, log=True, nadir=[1.0, 1.0]), (2.0, 3.0)))


def test_stch_measures_its_nadir_in_the_epoch_after_warm_up():
    rule = STCH(2, log=True, warm_up=2)
    assert rule.needs == ("epochs",) and STCH(2).needs == () and STCH(2, log=True, nadir=[1.0, 1.0]).needs == ()
    for means in [(9.0, 9.0), (5.0, 5.0), (1.0, 2.0)]:
        for wiggle in (0.9, 1.1):
            values = [m * wiggle for m in means]
            assert feed(rule, values).tolist() == pytest.approx([1 / v for v in values])  # Σ log L until then
            feed(rule, values, values)
        rule.end_epoch({})
        rule.end_epoch({})  # an epoch without a step is none
    assert rule.nadir.tolist() == pytest.approx([1.0, 2.0])
    assert feed(rule, (1.0, 6.0)).tolist() == pytest.approx([0.5, 0.25])


def test_stch_gives_a_late_term_its_own_nadir():
    rule = STCH(3, log=True, warm_up=0)
    feed(rule, (1.0, 2.0, NAN), (1.0, 2.0, NAN))
    rule.end_epoch({})
    assert feed(rule, (1.0, 6.0, 4.0)).tolist() == pytest.approx([0.5, 0.25, 0.25])
    feed(rule, (7.0, 7.0, 4.0), (7.0, 7.0, 4.0))
    rule.end_epoch({})
    assert rule.nadir.tolist() == [1.0, 2.0, 4.0]


def test_stch_leaves_out_what_has_no_logarithm():
    weights = feed(STCH(4, log=True, nadir=[1.0, 1.0, 2.0, 1.0]), (1.0, 0.0, 6.0, -2.0))
    assert weights.tolist() == pytest.approx([0.5, 1.0, 0.25, 1.0])


@pytest.mark.parametrize(
    "arguments",
    [
        {"mu": 0.0},
        {"mu": NAN},
        {"warm_up": -1},
        {"preference": [1.0]},
        {"preference": [1.0, 0.0]},
        {"ideal": [NAN, 0.0]},
        {"nadir": [1.0, 1.0]},
        {"log": True, "ideal": [0.0, 0.0]},
        {"log": True, "nadir": [1.0, -1.0]},
    ],
)
def test_stch_refuses(arguments):
    with pytest.raises(ValueError, match="STCH"):
        STCH(2, **arguments)


# ---- inverse means --------------------------------------------------------------------------------------------


def test_inverse_ema_by_hand():
    # β = ½, corrected for its start: (¼·3 + ½·6)/(¼ + ½) = 5; the size of a negative loss counts.
    rule = InverseEMA(4, decay=0.5)
    steps = (3.0, -3.0, NAN, NAN), (6.0, 6.0, 4.0, NAN), (0.0, 0.0, 0.0, 0.0)
    assert feed(rule, *steps).tolist() == [0.2, 0.2, 0.25, 1.0]


def test_inverse_ema_weighs_a_rare_bucket_like_a_frequent_one():
    rule = InverseEMA(2)
    for step in range(400):
        losses = doubles(1e-3, 1e-3 if step % 40 == 0 else NAN)
        rule.after_step(losses, context(losses))
    assert feed(rule, (1e-3, 1e-3)).tolist() == pytest.approx([1000.0, 1000.0])


def test_inverse_ema_is_clipped():
    assert inverse_weights(doubles(0.0, 1e-300, 1e300, 2.0)).tolist() == [1e7, 1e7, 1e-7, 0.5]


def test_inverse_ema_makes_terms_add_one():
    rule = InverseEMA(2)
    values = (300.0, 0.02)
    for _ in range(1500):
        losses = doubles(*values)
        rule.after_step(losses, context(losses))
    assert (feed(rule, values) * doubles(*values)).tolist() == pytest.approx([1.0, 1.0], rel=1e-3)


@pytest.mark.parametrize("decay", [-0.1, 1.0, NAN])
def test_inverse_ema_refuses(decay):
    with pytest.raises(ValueError, match="decay"):
        InverseEMA(2, decay=decay)


# ---- beside TorchJD -------------------------------------------------------------------------------------------


def scalarizer(*names: str):
    found = pytest.importorskip("torchjd.scalarization")
    kind = next((getattr(found, name) for name in names if hasattr(found, name)), None)
    return kind if kind is not None else pytest.skip(f"this torchjd has no {names[0]}")


def value_and_gradient(theirs: Callable[[Tensor], Tensor], values: Sequence[float]) -> tuple[float, list[float]]:
    losses = doubles(*values).requires_grad_()
    total = theirs(losses)
    return total.item(), torch.autograd.grad(total, losses)[0].tolist()


def ours(weighting: Weighting, values: Sequence[float]) -> tuple[float, list[float]]:
    names, losses = [f"t{i}" for i in range(len(values))], [live(value) for value in values]
    executor = LossExecutor(dict.fromkeys(names, 1.0), weighting=weighting, guards=Guards(share_cap=None))
    total = executor(dict(zip(names, losses, strict=True)))
    return total.item(), list(executor.weights.values())


VALUES = (0.7, 3.0, 2.0)


def test_gls_beside_torchjd():
    value, gradient = value_and_gradient(scalarizer("GLS", "GeometricMean")(), VALUES)
    total, weights = ours(GLS(3), VALUES)
    assert total == pytest.approx(value, rel=1e-6) and weights == pytest.approx(gradient, rel=1e-6)


def test_stch_beside_torchjd():
    preference, ideal = [0.2, 0.5, 0.3], [0.1, 0.0, -1.0]
    theirs = scalarizer("STCH")(0.4, doubles(*preference), doubles(*ideal))
    _, gradient = value_and_gradient(theirs, VALUES)
    assert ours(STCH(3, mu=0.4, preference=preference, ideal=ideal), VALUES)[1] == pytest.approx(gradient, rel=1e-6)
    _, even = value_and_gradient(scalarizer("STCH")(0.4), VALUES)
    assert ours(STCH(3, mu=0.4), VALUES)[1] == pytest.approx(even, rel=1e-6)


@pytest.mark.parametrize("kind", ["imtl_l", "uncertainty"])
def test_learned_rules_beside_torchjd(kind):
    learned = torch.tensor([0.3, -0.7, 1.1])
    theirs = scalarizer("IMTLL")(3) if kind == "imtl_l" else scalarizer("UW")(3)
    rule = IMTLL(3) if kind == "imtl_l" else Uncertainty(3)
    with torch.no_grad():
        for part in (theirs, rule):
            next(part.parameters()).copy_(learned)
    value, gradient = value_and_gradient(theirs, VALUES)
    total, weights = ours(rule, VALUES)
    assert total == pytest.approx(value, rel=1e-6) and weights == pytest.approx(gradient, rel=1e-6)


def test_dwa_beside_torchjd():
    theirs, rule = scalarizer("DWA")(), DWA(3)
    for epoch in [(2.0, 2.0, 2.0), (1.0, 1.9, 3.0), (0.8, 1.0, 1.0)]:
        losses = doubles(*epoch)
        theirs(losses)
        theirs.step()
        rule.after_step(losses, context(losses))
        rule.end_epoch({})
    _, gradient = value_and_gradient(theirs, VALUES)
    assert feed(rule, VALUES).tolist() == pytest.approx(gradient, rel=1e-6)


def test_famo_beside_torchjd():
    # Theirs is updated with losses computed again after the step: given the next step's, it is ours.
    theirs, rule = scalarizer("FAMO")(3), FAMO(3)
    adam = torch.optim.Adam(theirs.parameters(), lr=0.025, weight_decay=1e-3)
    steps = [(0.7, 3.0, 2.0), (0.6, 3.1, 1.0), (0.6, 2.0, 0.5), (0.5, 2.1, 0.6)]
    for now, after in zip(steps, steps[1:], strict=False):
        theirs(doubles(*now))
        theirs.update(doubles(*after))
        adam.step()
    for values in steps:
        rule.after_step(doubles(*values), context(doubles(*values)))
    _, gradient = value_and_gradient(theirs, VALUES)
    assert feed(rule, VALUES).tolist() == pytest.approx(gradient, rel=1e-6)
