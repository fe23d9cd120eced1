"""The gate on the monitor: when it must stay open, when it must close, and that it closes for good."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from adaptive_loss import LossMonitor
from adaptive_loss.losses import Terms
from adaptive_loss.rl.forecast_gate import FLOOR, LEAST, WIDTH, ForecastGate, highest, line
from adaptive_loss.signals import Signals
from adaptive_loss.weighting.base import Context

TRENDS: dict[str, Callable[[int], float]] = {
    "flat": lambda epoch: 0.0,
    "steady": lambda epoch: -0.03 * epoch,
    "slowing down": lambda epoch: math.log(0.2 + 2 * math.exp(-epoch / 8)),
    "a power law": lambda epoch: -0.5 * math.log(1 + epoch),
    "a plateau after a fall": lambda epoch: -0.1 * min(epoch, 15),
}
SCATTERS = (0.0, 0.003, 0.03, 0.3)


def losses(trend: str, scatter: float, epochs: int, seed: int) -> list[float]:
    noise = torch.randn(epochs, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return [math.exp(TRENDS[trend](epoch) + scatter * float(noise[epoch])) for epoch in range(epochs)]


def closing(values: list[float], acting: bool = True) -> int | None:
    """The epoch in which the gate begins to close, if it does."""
    gate = ForecastGate()
    for epoch, loss in enumerate(values):
        if gate.observe(epoch, loss, acting):
            return epoch
    return None


def test_line_by_hand() -> None:
    # Slopes 2 (0→1), 1 (0→2), 0 (1→2): their median is 1; heights at 0 are 0, 1, 0.
    assert line([(0, 0.0), (1, 2.0), (2, 2.0)]) == (1.0, 0.0)


def test_highest_by_hand() -> None:
    history = [(i, -0.1 * i) for i in range(8)]
    # Exactly on a line: the forecast is the median of the last three, which is above it, and the spread is the least.
    expected, limit = highest(history, 8)
    assert expected == pytest.approx(-0.6) and limit == pytest.approx(-0.6 + WIDTH * FLOOR)
    # Residuals ±1 alternate about a flat line: MAD 1, over two numbers 8/6 more.
    zigzag = [(i, 1.0 if i % 2 else -1.0) for i in range(8)]
    slope, start = line(zigzag)
    scatter = sorted(abs(y - start - slope * i) for i, y in zigzag)
    expected, limit = highest(zigzag, 8)
    assert limit - expected == pytest.approx(WIDTH * 1.4826 * (scatter[3] + scatter[4]) / 2 * 8 / 6)


@pytest.mark.parametrize("trend", TRENDS)
def test_false_alarms_are_a_few_per_cent_of_runs_of_60_epochs_that_never_rest(trend: str) -> None:
    runs = [closing(losses(trend, scatter, 60, seed)) for scatter in SCATTERS for seed in range(50)]
    assert sum(run is not None for run in runs) <= 0.04 * len(runs)


@pytest.mark.parametrize("trend", ["slowing down", "a power law", "a plateau after a fall", "flat", "steady"])
def test_an_improvement_without_scatter_never_closes_it(trend: str) -> None:
    assert closing(losses(trend, 0.0, 200, 0)) is None


@pytest.mark.parametrize("scatter", [0.0, 0.01, 0.03])
@pytest.mark.parametrize("trend", ["flat", "steady", "slowing down"])
def test_a_lasting_step_closes_it_within_five_epochs(trend: str, scatter: float) -> None:
    # What the trend makes good in three epochs is no lasting step.
    step, found = 0.35 + 20 * scatter, []
    for seed in range(30):
        values = losses(trend, scatter, 30, seed)
        found.append(closing([v * math.exp(step) if epoch >= 20 else v for epoch, v in enumerate(values)]))
    assert sum(epoch is not None and 22 <= epoch < 25 for epoch in found) >= 27


def test_one_bad_epoch_or_one_in_three_closes_nothing() -> None:
    values = [1.0] * 40
    assert closing([5.0 if epoch == 20 else v for epoch, v in enumerate(values)]) is None
    assert closing([5.0 if epoch >= 10 and epoch % 3 == 0 else v for epoch, v in enumerate(values)]) is None
    assert closing([5.0 if epoch >= 10 and epoch % 4 else v for epoch, v in enumerate(values)]) is not None


def test_without_a_residual_it_never_closes_and_a_new_level_becomes_the_reference() -> None:
    values = [1.0] * 20 + [5.0] * 20
    assert closing(values, acting=False) is None
    gate = ForecastGate()
    for epoch, loss in enumerate(values):
        gate.observe(epoch, loss, acting=False)
    assert not any(gate.observe(40 + epoch, 5.0, acting=True) for epoch in range(20)) and gate.share == 1.0


def test_it_judges_nothing_before_it_has_seen_enough_and_takes_no_number_that_says_nothing() -> None:
    gate = ForecastGate()
    for epoch, loss in enumerate([1.0] * (LEAST - 1) + [math.nan, math.inf, 0.0, -1.0]):
        assert gate.observe(epoch, loss, acting=True) == []
    assert len(gate.history) == LEAST - 1 and gate.count == 0
    assert gate.observe(99, 50.0, acting=True) == [] and gate.count == 0


def test_it_halves_to_0_in_words_and_never_opens_again() -> None:
    gate, shares, told = ForecastGate(), [], []
    for epoch, loss in enumerate([1.0] * 10 + [2.0] * 3 + [0.5] * 20):
        told += gate.observe(epoch, loss, acting=True)
        shares.append(gate.share)
    assert shares[11:18] == [1.0, 0.5, 0.25, 0.125, 0.0625, 0.0, 0.0] and shares[-1] == 0.0
    assert [(event.step, event.kind) for event in told] == [(12, "gate"), (16, "gate")]
    assert told[0].reason == ("held-out loss 2 where its trend expects 1, at most 1.041: rho is halved, and so on to 0")
    assert told[1].reason == "rho is 0: the monitor goes on in shadow"


def test_state_continues_bit_for_bit() -> None:
    values = losses("steady", 0.03, 30, 0) + [9.0] * 6
    one = ForecastGate()
    for cut in range(len(values)):
        two = ForecastGate()
        two.load_state_dict(one.state_dict())
        events = [two.observe(i, v, True) for i, v in enumerate(values) if i >= cut]
        whole = ForecastGate()
        assert [whole.observe(i, v, True) for i, v in enumerate(values)][cut:] == events
        assert vars(two) == vars(whole)
        one.observe(cut, values[cut], True)


# ---- in the monitor -------------------------------------------------------------------------------------------------


def ended(rho: float, metric: str, residual: float = 0.5) -> LossMonitor:
    """A monitor with a residual after ten good epochs and six bad ones."""
    monitor = LossMonitor(rho=rho)
    monitor.bind(Terms({"fit": 1.0, "kl": 1.0}, base="fit"), None, 0)
    monitor.nudges.residual[1] = residual
    ones = torch.ones(2, dtype=torch.float64)
    context = Context(1, torch.ones(2, dtype=torch.bool), Signals(2, None), ones, ones, objective=lambda: 1.0)
    for epoch in range(16):
        loss = 0.4 if epoch < 10 else 0.8
        monitor.end_epoch(context, {metric: loss if metric == "select_loss" else 1 - loss})
    return monitor


@pytest.mark.parametrize("metric", ["select_loss", "select_accuracy"])
def test_the_monitor_s_gains_go_to_0_and_its_residual_stays(metric: str) -> None:
    monitor = ended(0.8, metric)
    assert monitor.rho == 0.8 and monitor.strength == 0.8 / 16
    assert monitor.gains().tolist() == pytest.approx([0.0, 0.5 * 0.05]) and float(monitor.nudges.residual[1]) == 0.5
    again = LossMonitor(rho=0.8)
    again.bind(Terms({"fit": 1.0, "kl": 1.0}, base="fit"), None, 0)
    again.load_state_dict(monitor.state_dict())
    assert again.strength == monitor.strength and torch.equal(again.gains(), monitor.gains())


@pytest.mark.parametrize(("rho", "residual"), [(0.0, 0.5), (1.0, 0.0)])
def test_with_nothing_applied_the_monitor_s_gate_stays_open(rho: float, residual: float) -> None:
    assert ended(rho, "select_loss", residual).gate.share == 1.0


def test_other_metrics_say_nothing_to_it() -> None:
    assert ended(1.0, "select_kl").gate.history == []


def test_a_gate_that_closes_goes_on_closing_whatever_the_loss() -> None:
    gate = ForecastGate()
    gate.share = 0.5
    while gate.share:
        before = gate.share
        gate.observe(1, math.nan, acting=True)
        assert gate.share < before
