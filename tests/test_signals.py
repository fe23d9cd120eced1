"""Signals: golden values by hand, units, clipping, absent terms, negative losses, the state."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adaptive_loss.gradients import LookAhead, look_ahead, slopes
from adaptive_loss.signals import GLOBAL_FEATURES, TERM_FEATURES, Average, Recall, Signals, log_ratio

ONE = torch.ones(1, dtype=torch.float64)
COLUMN = {name: i for i, name in enumerate(TERM_FEATURES)}
PLACE = {name: i for i, name in enumerate(GLOBAL_FEATURES)}


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def products(gain: Tensor) -> Tensor:
    """A Gramian of orthogonal terms of length 1 that are there."""
    return torch.diag(torch.cat([torch.where(gain.isnan(), gain, 1.0), vector(1.0)]))


def found(*gain: float, objective: float = 1.0) -> LookAhead:
    values = vector(*gain)
    return LookAhead(
        values, values / 2, values / 4, torch.where(values.isnan(), values, 0.5), objective, products(values)
    )


def feature(signals: Signals, name: str, weights: Tensor = ONE, set_point: Tensor = ONE, start: Tensor = ONE) -> float:
    return float(signals.term_features(weights, set_point, start)[0, COLUMN[name]])


def test_average_by_hand() -> None:
    average = Average(vector(0.5, 0.5))
    assert average.mean.isnan().all()
    average.update(vector(4.0, math.nan))
    assert average.mean.tolist()[0] == 4.0 and average.mean[1].isnan()
    average.update(vector(1.0, 6.0))
    # (0.25·4 + 0.5·1)/0.75 = 2; the second entry has seen one value alone.
    assert average.mean.tolist() == pytest.approx([2.0, 6.0])


def test_term_features_by_hand() -> None:
    signals = Signals(1, 100)
    for value in (4.0, 1.0):
        signals.update(vector(value))
    fast, slow = (0.09 * 4 + 0.1 * 1) / 0.19, (0.0099 * 4 + 0.01 * 1) / 0.0199
    square = (0.0099 * 16 + 0.01 * 1) / 0.0199
    assert feature(signals, "log_fast_over_slow") == pytest.approx(math.log(fast / slow))
    assert feature(signals, "log_over_first") == pytest.approx(math.log(slow / 2.5) / 5)
    assert feature(signals, "log_spread") == pytest.approx(math.log(math.sqrt(square - slow**2) / slow))
    assert feature(signals, "log_gradient_share") == 0.0  # one term holds everything
    weights = vector(3.0)
    assert feature(signals, "log_weight_over_set_point", weights, vector(1.5), vector(6.0)) == pytest.approx(
        math.log(2)
    )
    assert feature(signals, "log_weight_over_start", weights, vector(1.5), vector(6.0)) == pytest.approx(-math.log(2))


def test_first_is_the_mean_of_the_first_ten_values() -> None:
    signals = Signals(1, None)
    for value in range(1, 31):
        signals.update(vector(float(value)))
    assert signals.first.tolist() == pytest.approx([5.5])


def test_a_term_that_comes_in_mid_run_is_the_newest() -> None:
    signals = Signals(3, 1000)
    for step in range(200):
        signals.update(vector(1.0, 1.0 if step >= 20 else math.nan, 1.0 if step >= 120 else math.nan))
    assert signals.arrivals.tolist() == [0.0, 20.0, 120.0]
    assert signals.newest == 120  # the second is one of the first


def test_of_terms_that_come_one_by_one_few_count() -> None:
    signals, newest = Signals(1000, None), set()
    for step in range(1000):
        signals.update(torch.where(torch.arange(1000) <= step, 1.0, math.nan).double())
        newest.add(signals.newest)
    assert 1 < len(newest) < 12


def test_trust_by_hand() -> None:
    signals = Signals(2, 100)
    signals.look(found(0.5, -0.1), train=1.0)
    # t = 0.2h/√(0.2h²) = √0.2 after one look-ahead, whatever its size.
    assert signals.trust.tolist() == pytest.approx([math.sqrt(0.2), -math.sqrt(0.2)])
    signals.look(found(0.5, 0.1), train=1.0)
    assert signals.trust[0] == pytest.approx(0.36 / math.sqrt(0.36))
    assert signals.trust[1] == pytest.approx((-0.16 + 0.2) * 0.1 / math.sqrt(0.36 * 0.01))
    # t of the mean, 9 = (1 + 0.8)/(1 − 0.8): 0.18/√((0.09 − 0.0324)/9).
    assert signals.t_statistic[0] == pytest.approx(0.18 / math.sqrt((0.09 - 0.0324) / 9))


def test_trust_and_t_are_0_before_any_look_ahead_and_for_gains_of_0() -> None:
    signals = Signals(2, 100)
    assert signals.trust.tolist() == signals.t_statistic.tolist() == [0.0, 0.0]
    signals.look(found(0.0, math.nan), train=1.0)
    assert signals.trust.tolist() == signals.t_statistic.tolist() == [0.0, 0.0]


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=40))
@settings(max_examples=50, deadline=None)
def test_trust_stays_within_one(gains: list[float]) -> None:
    signals = Signals(1, None)
    for gain in gains:
        signals.look(found(gain), train=1.0)
    assert abs(float(signals.trust)) <= 1 + 1e-9
    assert math.isfinite(float(signals.t_statistic))


def test_an_absent_term_keeps_what_is_known_of_it() -> None:
    signals = Signals(2, 100)
    signals.update(vector(1.0, 2.0))
    signals.look(found(0.5, 0.25), train=1.0)
    before = signals.term_features(ONE.expand(2), ONE.expand(2), ONE.expand(2))[1].clone()
    signals.update(vector(3.0, math.nan))
    signals.look(found(0.1, math.nan), train=1.0)
    after = signals.term_features(ONE.expand(2), ONE.expand(2), ONE.expand(2))[1]
    torch.testing.assert_close(before, after)
    assert signals.counts.tolist() == [2.0, 1.0]


def test_global_features_by_hand() -> None:
    signals = Signals(1, 100)
    for step in range(10):
        signals.update(ONE, gradient_norm=1.0 + step, clipped=step == 9, learning_rate=0.1 * (step + 1))
    values = signals.global_features().tolist()
    assert len(values) == len(GLOBAL_FEATURES)
    assert values[:6] == pytest.approx([math.tanh(10 * (0.1 - c)) for c in (0.03, 0.1, 0.25, 0.5, 0.8, 1.1)])
    assert values[PLACE["log_learning_rate"]] == pytest.approx(math.log(10))
    weights = [0.99 ** (9 - i) for i in range(10)]
    mean = sum(w * (1 + i) for i, w in enumerate(weights)) / sum(weights)
    assert values[PLACE["log_gradient_norm"]] == pytest.approx(math.log(10 / mean))
    assert values[PLACE["clip_rate"]] == pytest.approx(1 / sum(weights))
    signals.look(found(0.1, objective=2.0), train=1.0)
    signals.look(found(0.1, objective=1.0), train=0.5)
    values = signals.global_features().tolist()
    assert values[PLACE["probe_slope"]] == pytest.approx(10 * 0.2 * math.log(0.5))
    assert values[PLACE["log_probe_over_train"]] == pytest.approx(math.log(2))


def test_unknown_length_is_progress_none_and_reads_as_0() -> None:
    signals, known = Signals(1, None), Signals(1, 10)
    signals.update(ONE)
    assert signals.progress is None
    assert signals.global_features()[:6].tolist() == known.global_features()[:6].tolist()


def test_nothing_known_reads_as_0_and_nothing_is_ever_nan() -> None:
    signals = Signals(2, 100)
    blank = signals.term_features(*(vector(1.0, 0.0),) * 3)
    assert blank[:, [c for n, c in COLUMN.items() if n != "log_gradient_share"]].abs().sum() == 0
    signals.update(vector(math.nan, math.nan), gradient_norm=math.nan, learning_rate=math.nan)
    assert torch.isfinite(signals.global_features()).all()


@given(st.lists(st.floats(-1e200, 1e200) | st.just(math.nan), min_size=1, max_size=12))
@settings(max_examples=80, deadline=None)
def test_features_are_clipped_and_finite_for_any_losses(losses: list[float]) -> None:
    signals = Signals(1, 12)
    for loss in losses:
        signals.update(vector(loss), gradient_norm=abs(loss), learning_rate=1e-3)
        signals.see_objective(loss)
    terms, whole = signals.term_features(ONE * 1e12, ONE * 1e-12, ONE), signals.global_features()
    for values in (terms, whole):
        assert torch.isfinite(values).all() and float(values.abs().max()) <= 5


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("unit", [1e-15, 1e-6, 1e6, 1e15])
def test_features_have_no_unit(unit: float, sign: float) -> None:
    plain, other = Signals(1, 100), Signals(1, 100)
    dice = torch.Generator().manual_seed(5)
    for _ in range(40):
        value = sign * (1 + 0.3 * torch.rand(1, generator=dice, dtype=torch.float64))
        plain.update(value)
        other.update(value * unit)
    torch.testing.assert_close(
        plain.term_features(ONE, ONE, ONE), other.term_features(ONE, ONE, ONE), rtol=1e-6, atol=1e-6
    )


def test_negative_losses_are_scaled_by_their_spread() -> None:
    signals = Signals(1, 100)
    for value in (-1.0, -3.0):
        signals.update(vector(value))
    fast, slow = -(0.09 * 1 + 0.1 * 3) / 0.19, -(0.0099 * 1 + 0.01 * 3) / 0.0199
    spread = math.sqrt((0.0099 * 1 + 0.01 * 9) / 0.0199 - slow**2)
    assert feature(signals, "log_fast_over_slow") == pytest.approx((fast - slow) / spread)
    assert feature(signals, "log_over_first") == pytest.approx((slow + 2.0) / spread / 5)


@pytest.mark.parametrize("value", [0.0, -0.1, -1e-3, -7.3e8])
def test_a_constant_loss_moves_nothing(value: float) -> None:
    signals = Signals(1, 100)
    for _ in range(50):
        signals.update(vector(value))
    assert feature(signals, "log_fast_over_slow") == pytest.approx(0, abs=1e-2)
    assert feature(signals, "log_over_first") == pytest.approx(0, abs=1e-2)


def test_a_sign_once_seen_stays_seen() -> None:
    signals = Signals(1, 100)
    for value in (1.0, -1.0, 1.0):
        signals.update(vector(value))
    assert signals.signed.tolist() == [True]


def test_a_term_that_is_off_has_log_weights_of_0() -> None:
    features = Signals(1, 10).term_features(vector(0.0), vector(0.0), vector(0.0))
    assert features[0, COLUMN["log_weight_over_set_point"]] == features[0, COLUMN["log_weight_over_start"]] == 0


@pytest.mark.parametrize(
    ("top", "bottom", "wanted"),
    [
        (2.0, 1.0, math.log(2)),
        (-1.0, -2.0, 0.5),
        (1.0, -1.0, 2.0),
        (0.0, 0.0, 0.0),
        (0.0, 2.0, -1.0),
        (math.nan, 1.0, 0.0),
        (1.0, math.inf, 0.0),
        (1e300, 1e-300, math.log(1e300) - math.log(1e-300)),
    ],
)
def test_log_ratio(top: float, bottom: float, wanted: float) -> None:
    assert log_ratio(top, bottom) == pytest.approx(wanted)


def test_state_round_trip_continues_bit_for_bit() -> None:
    def advance(signals: Signals, start: int) -> None:
        for i in range(start, start + 7):
            signals.update(
                vector(1.0 / (i + 1), math.nan if i % 3 else -i), gradient_norm=i, learning_rate=0.1 / (i + 1)
            )
            signals.look(found(math.sin(i), math.nan if i % 2 else 0.1, objective=2.0 / (i + 1)), train=1.0)

    one, other = Signals(2, 100), Signals(2, 100)
    advance(one, 0)
    buffer = io.BytesIO()
    torch.save(one.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    advance(one, 7)
    advance(other, 7)
    ones = vector(1.0, 1.0)
    assert torch.equal(one.term_features(ones, ones, ones), other.term_features(ones, ones, ones))
    assert torch.equal(one.global_features(), other.global_features())
    assert one.step == other.step == 14 and one.look_aheads == other.look_aheads


def look_at(vectors: Tensor, weights: Tensor) -> LookAhead:
    return look_ahead(vectors @ vectors.T, weights, 0, 1.0)


def asked(signals: Signals, weights: Tensor) -> tuple[Tensor, Tensor]:
    trust, share = Recall(signals.gramians).at(weights.numpy())
    return torch.from_numpy(trust), torch.from_numpy(share)


def test_recalled_where_it_looked_is_trust_and_share_themselves() -> None:
    signals, dice = Signals(3, 100), torch.Generator().manual_seed(2)
    weights = vector(1.0, 0.2, 30.0)
    for _ in range(9):
        signals.look(look_at(torch.randn(4, 6, generator=dice, dtype=torch.float64), weights), 1.0)
    trust, share = asked(signals, weights)
    torch.testing.assert_close(trust, signals.trust)
    torch.testing.assert_close(share, signals.share)


def test_recalled_at_the_weights_that_serve_the_probe_trusts_nothing_more() -> None:
    signals, dice = Signals(2, 100), torch.Generator().manual_seed(2)
    for _ in range(9):
        terms = torch.randn(2, 6, generator=dice, dtype=torch.float64)
        probe = terms[0] + 3 * terms[1]
        signals.look(look_at(torch.cat([terms, probe[None]]), vector(1.0, 300.0)), 1.0)
    assert asked(signals, vector(1.0, 300.0))[0][1] < -0.8
    assert asked(signals, vector(1.0, 0.03))[0][1] > 0.8
    assert asked(signals, vector(1.0, 3.0))[0].abs().max() < 1e-6  # rounding has a sign, and must not count


def test_a_look_ahead_recalls_nothing_of_a_term_that_was_absent() -> None:
    vectors = torch.randn(5, 4, 6, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    gramians, weights = vectors @ vectors.mT, vector(1.0, 0.1, 3.0)
    gramians[3, 1], gramians[3, :, 1] = math.nan, math.nan
    gains = slopes(gramians, weights).nan_to_num(0.0)
    part = 0.2 * 0.8 ** torch.arange(4, -1, -1, dtype=torch.float64)
    trust, _ = Recall(gramians).at(weights.numpy())
    torch.testing.assert_close(torch.from_numpy(trust), part @ gains / (part @ gains**2).sqrt())


@pytest.mark.parametrize("looks", [1, 12])
def test_recalled_trust_of_equal_look_aheads_stays_within_one(looks: int) -> None:
    vectors = torch.randn(4, 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    trust, _ = Recall((vectors @ vectors.mT).expand(looks, 4, 4)).at(np.ones(3))
    assert np.abs(trust).tolist() == pytest.approx([math.sqrt(1 - 0.8**looks)] * 3)


def test_several_runs_recall_at_once_what_each_recalls_alone() -> None:
    dice = torch.Generator().manual_seed(3)
    vectors = torch.randn(4, 5, 4, 6, generator=dice, dtype=torch.float64)
    gramians, weights = vectors @ vectors.mT, np.array([[1.0, 0.1, 3.0]] * 4) * np.arange(1, 5)[:, None]
    gramians[2, 1, 1], gramians[2, 1, :, 1] = np.nan, np.nan  # a term that was absent once
    together = Recall(gramians).at(weights)
    for n in range(4):
        for ours, own in zip(together, Recall(gramians[n]).at(weights[n]), strict=True):
            assert ours[n].tolist() == pytest.approx(own.tolist(), abs=1e-12)


@pytest.mark.parametrize(("terms", "kept"), [(2, 12), (1000, 3)])
def test_the_memory_of_look_aheads_is_bounded(terms: int, kept: int) -> None:
    signals = Signals(terms, 100)
    values = torch.zeros(terms, dtype=torch.float64)
    for i in range(14):
        signals.look(LookAhead(values, values, values, values, 1.0, i * torch.eye(terms + 1, dtype=torch.float64)), 1.0)
    assert signals.gramians[:, 0, 0].tolist() == list(range(14 - kept, 14))


def test_the_saved_state_is_a_copy() -> None:
    signals = Signals(1, 10)
    signals.update(ONE)
    state = signals.state_dict()
    signals.update(ONE * 9)
    again = Signals(1, 10)
    again.load_state_dict(state)
    assert again.step == 1 and again.fast.tolist() == pytest.approx([1.0])
