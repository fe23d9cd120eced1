"""The monitor: identities, masks, learning, reward, its random control, and its card."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from toy import WEIGHTS, Run, train

from adaptive_loss import LossExecutor, LossMonitor, MetaController
from adaptive_loss import signals as signal
from adaptive_loss.gradients import LookAhead
from adaptive_loss.loss_monitor import MonitorConfig, RandomMonitor
from adaptive_loss.losses import Terms
from adaptive_loss.meta_controller import RULE
from adaptive_loss.rl.nudges import KEEP, RESET, look_ahead_prior
from adaptive_loss.signals import Signals
from adaptive_loss.weighting.base import Context

BOUND = math.log(4)


def monitor_of(run: Run) -> LossMonitor:
    return next(m for m in run.executor.modulators if isinstance(m, LossMonitor))


def actions(run: Run) -> list[tuple[int, str]]:
    return [(event.step, event.reason) for event in run.events if event.kind == "action"]


# ---- identities -----------------------------------------------------------------------------------------------------


def test_rho_0_is_the_controller_alone_bit_for_bit() -> None:
    alone = train([MetaController(RULE)], steps=140)
    silent = train([MetaController(RULE), LossMonitor(rho=0.0)], steps=140)
    assert torch.equal(alone.parameters, silent.parameters)
    assert alone.weights == silent.weights
    assert monitor_of(silent).statistics()["updates"] > 0  # it did learn and log
    assert actions(silent)


def test_rho_0_alone_is_no_modulator_bit_for_bit() -> None:
    silent, nothing = train([LossMonitor(rho=0.0)], steps=120), train([], steps=120)
    assert torch.equal(silent.parameters, nothing.parameters) and silent.weights == nothing.weights


def test_gains_are_rho_times_the_residual_and_reach_the_weights() -> None:
    run = train([RandomMonitor(rho=0.5)], steps=200)
    after = [event for event in run.events if event.kind == "action"]
    for event, following in zip(after, after[1:], strict=False):
        wanted = {name: w * math.exp(0.5 * event.details["after"][name]) for name, w in WEIGHTS.items()}
        # Weights are listed from step 0: the one after `step` accepted steps is the first to feel the action.
        assert run.weights[event.step] == pytest.approx(wanted)
        assert following.details["before"] == event.details["after"]
    assert len(after) > 5


@pytest.mark.parametrize("rho", [-0.1, 1.1, math.nan, math.inf])
def test_rho_outside_the_unit_interval_is_refused(rho: float) -> None:
    with pytest.raises(ValueError, match="rho"):
        LossMonitor(rho=rho)


# ---- a run ----------------------------------------------------------------------------------------------------------


def test_in_a_run_the_replay_fills_it_updates_and_the_target_syncs() -> None:
    run = train([MetaController(RULE), LossMonitor()], steps=300)
    statistics = monitor_of(run).statistics()
    # A decision every 10 steps, the transition that ends at the first decision after 85% is the last.
    assert statistics["transitions"] == 26
    assert statistics["updates"] > 50 and statistics["target_syncs"] >= 1
    assert math.isfinite(statistics["loss"]) and statistics["epsilon"] < 0.2
    assert len(monitor_of(run).agent.replay) > 20


def test_it_only_keeps_in_the_quiet_parts_of_a_run() -> None:
    run = train([RandomMonitor()], steps=400)
    steps = [step for step, _ in actions(run)]
    assert steps and min(steps) >= 20 and max(steps) <= 340


def test_decisions_become_rarer_on_long_runs() -> None:
    monitor = LossMonitor()
    monitor.bind(Terms(WEIGHTS, "fit"), 100_000, 0)
    asked = []

    def objective() -> float:
        asked.append(step)
        return 1.0

    signals = Signals(3, 100_000)
    for step in range(1, 5_001):
        signals.step = step
        monitor.after_step(context(signals, objective))
    assert len(asked) == 5 and {b - a for a, b in zip(asked, asked[1:], strict=False)} == {1000}


def test_other_seeds_differ_and_the_same_seed_does_not() -> None:
    def path(seed: int) -> list[tuple[int, str]]:
        return actions(train([LossMonitor()], steps=150, seed=seed))

    paths = [path(seed) for seed in (1, 1, 2, 3)]
    assert paths[0] == paths[1] and paths[0]
    assert len({tuple(p) for p in paths}) == 3


def test_the_random_monitor_acts_differently_and_never_learns() -> None:
    learner = train([MetaController(RULE), LossMonitor()], steps=150)
    chance = train([MetaController(RULE), RandomMonitor()], steps=150)
    statistics = monitor_of(chance).statistics()
    assert statistics["updates"] == statistics["transitions"] == statistics["target_syncs"] == 0
    assert actions(chance) and actions(chance) != actions(learner)
    fresh = RandomMonitor()
    fresh.bind(Terms(WEIGHTS, "fit"), 150, 0)
    for name, value in fresh.agent.online.state_dict().items():
        assert torch.equal(value, monitor_of(chance).agent.online.state_dict()[name])


def test_the_random_monitor_takes_every_allowed_action_about_equally_often() -> None:
    monitor = RandomMonitor()
    monitor.bind(Terms(WEIGHTS, "fit"), None, 3)
    mask = torch.tensor([True, False, True, True, False, True])
    taken = torch.bincount(torch.tensor([monitor._choose(torch.zeros(1), mask) for _ in range(4000)]), minlength=6)
    assert taken[~mask].sum() == 0
    assert float((taken[mask] - 1000).abs().max()) < 150  # 5 standard deviations of 27


def test_unknown_length_has_no_quiet_parts_and_discounts() -> None:
    run = train([RandomMonitor()], steps=100, known_length=False)
    assert actions(run)[0][0] <= 30
    assert monitor_of(run).agent.config.gamma == 0.99


def test_without_a_probe_it_decides_on_the_select_loss_or_not_at_all() -> None:
    with pytest.warns(UserWarning, match="no probe"):
        silent = train([RandomMonitor()], steps=200, probe=False)
    with pytest.warns(UserWarning, match="no probe"):
        told = train([RandomMonitor()], steps=200, probe=False, epoch=10)
    assert not actions(silent) and actions(told)
    assert all(step % 10 == 0 for step, _ in actions(told))


@pytest.mark.parametrize("objective", [math.nan, math.inf, -math.inf])
def test_an_objective_that_is_not_finite_is_no_decision(objective: float) -> None:
    monitor, signals = bound_monitor()
    before = monitor.state_dict()
    assert monitor.after_step(context(signals, lambda: objective)) == []
    after = monitor.state_dict()
    assert before["rewards"] == after["rewards"] and after["before"] is None


def test_one_base_term_alone_leaves_nothing_to_do() -> None:
    monitor = LossMonitor()
    monitor.bind(Terms({"fit": 1.0}, "fit"), 10, 0)
    signals = Signals(1, 10)
    signals.update(torch.ones(1, dtype=torch.float64))
    assert monitor.after_step(context(signals, lambda: 1.0, k=1)) == []


def test_state_round_trip_continues_bit_for_bit() -> None:
    def drive(monitor: LossMonitor, signals: Signals, values: Iterator[float], decisions: int) -> list[str]:
        reasons = []
        for _ in range(decisions):
            for _ in range(10):
                signals.update(torch.rand(3, generator=dice, dtype=torch.float64))
            signals.look(LookAhead(*(torch.rand(3, generator=dice, dtype=torch.float64) - 0.4,) * 4, 1.0, GRAMIAN), 1.0)
            reasons += [event.reason for event in monitor.after_step(context(signals, lambda: next(values)))]
        return reasons

    for kind in (LossMonitor, RandomMonitor):
        dice = torch.Generator().manual_seed(0)
        one, signals = bound_monitor(kind)
        drive(one, signals, iter([1.0 + 0.3 * math.sin(i) for i in range(20)]), 20)
        buffer = io.BytesIO()
        torch.save({"monitor": one.state_dict(), "signals": signals.state_dict(), "dice": dice.get_state()}, buffer)
        ends = []
        for _ in range(2):
            buffer.seek(0)
            saved = torch.load(buffer, weights_only=True)
            again, seen = bound_monitor(kind)
            again.load_state_dict(saved["monitor"])
            seen.load_state_dict(saved["signals"])
            dice.set_state(saved["dice"])
            ends.append(drive(again, seen, iter([1.0 + 0.2 * math.cos(i) for i in range(25)]), 25))
        dice.set_state(saved["dice"])
        ends.append(drive(one, signals, iter([1.0 + 0.2 * math.cos(i) for i in range(25)]), 25))
        assert ends[0] == ends[1] == ends[2] and ends[0]


# ---- masks ----------------------------------------------------------------------------------------------------------


def bound_monitor(kind: type[LossMonitor] = LossMonitor, total: int | None = None) -> tuple[LossMonitor, Signals]:
    monitor = kind()
    monitor.bind(Terms(WEIGHTS, "fit"), total, 0)
    signals = Signals(3, total)
    signals.update(torch.ones(3, dtype=torch.float64))
    return monitor, signals


def context(signals: Signals, objective: object = None, k: int = 3, present: Tensor | None = None) -> Context:
    ones = torch.ones(k, dtype=torch.float64)
    here = torch.ones(k, dtype=torch.bool) if present is None else present
    return Context(signals.step, here, signals, ones, ones, False, objective)  # type: ignore[arg-type]


MASKED = bound_monitor()[0]
GRAMIAN = torch.eye(4, dtype=torch.float64)


@given(
    step=st.integers(1, 120),
    length=st.sampled_from([None, 100]),
    nudges=st.lists(st.integers(-6, 6), min_size=2, max_size=2),
    resting=st.lists(st.integers(0, 2), min_size=2, max_size=2),
    gains=st.lists(st.lists(st.floats(-1, 1), min_size=3, max_size=3), max_size=8),
    present=st.lists(st.booleans(), min_size=3, max_size=3),
)
@settings(max_examples=100, deadline=None)
def test_masks(
    step: int,
    length: int | None,
    nudges: list[int],
    resting: list[int],
    gains: list[list[float]],
    present: list[bool],
) -> None:
    monitor, signals = MASKED, Signals(3, length)
    signals.step = step
    monitor.nudges.residual[1:] = torch.tensor(nudges, dtype=torch.float64) * monitor.config.step
    monitor.nudges.resting[1:] = resting
    for gain in gains:
        values = torch.tensor(gain, dtype=torch.float64)
        signals.look(LookAhead(values, values, values, values.abs(), 1.0, GRAMIAN), 1.0)
    mask = monitor.nudges.mask(context(signals, present=torch.tensor(present)))
    assert mask[KEEP] and len(mask) == 6
    if length is not None and not 5 <= step <= 85:
        assert int(mask.sum()) == 1
        return
    lifts_doubted = any(n < 0 and float(signals.t_statistic[i]) < -2 for n, i in zip(nudges, (1, 2), strict=True))
    assert bool(mask[RESET]) == (any(nudges) and not lifts_doubted)  # a reset raises what had been lowered
    for place, i in enumerate((1, 2)):
        up, down = bool(mask[2 + 2 * place]), bool(mask[3 + 2 * place])
        t = float(signals.t_statistic[i])
        free = present[i] and resting[place] == 0
        assert up == (free and nudges[place] < 6 and t >= -2)
        assert down == (free and nudges[place] > -6)
        if up:
            assert float(monitor.nudges.residual[i]) + monitor.config.step <= BOUND + 1e-9
        if down:
            assert float(monitor.nudges.residual[i]) - monitor.config.step >= -BOUND - 1e-9


def test_a_nudged_term_rests_for_two_decisions_and_the_residual_stays_bounded() -> None:
    monitor, signals = bound_monitor(RandomMonitor)
    last: dict[str, int] = {}
    for decision in range(400):
        for _ in range(10):
            signals.update(torch.ones(3, dtype=torch.float64))
        for event in monitor.after_step(context(signals, lambda: 1.0)):
            if event.reason != "reset":
                term = event.reason.split("'")[1]
                assert decision - last.get(term, -9) > 2
                last[term] = decision
            assert event.details["after"] == dict(zip(WEIGHTS, monitor.nudges.residual.tolist(), strict=True))
        assert float(monitor.nudges.residual.abs().max()) <= BOUND and monitor.nudges.residual[0] == 0
    assert set(last) == {"helpful", "harmful"}


# ---- reward and prior -----------------------------------------------------------------------------------------------


def test_reward_by_hand() -> None:
    monitor, _ = bound_monitor()
    # Gains 1, 0: mean 1 then 1/2; running squares 1² then 1²/2 + (−1)²/2 = 1.
    assert monitor._reward(1.0) == pytest.approx(1.0)
    assert monitor._reward(0.0) == pytest.approx(-1.0)
    # Mean 1/2, gain 2: centred 1.5, square 1 + (2.25 − 1)/3.
    assert monitor._reward(2.0) == pytest.approx(1.5 / math.sqrt(1 + 1.25 / 3))


def test_reward_is_0_where_nothing_ever_changes_and_at_most_3() -> None:
    monitor, _ = bound_monitor()
    assert [monitor._reward(0.0) for _ in range(30)] == [0.0] * 30
    assert monitor._reward(1e-6) <= 3
    assert all(abs(monitor._reward(g)) <= 3 for g in (1400.0, -1e-300, 700.0, -1400.0))


def rewarded(factor: float, monitor: LossMonitor) -> list[float]:
    """The rewards of a run whose objective does not hang on the weights, start weights times ``factor``."""
    rewards: list[float] = []
    inner = monitor._reward
    monitor._reward = lambda gain: rewards.append(inner(gain)) or rewards[-1]  # type: ignore[method-assign]
    w, clock = nn.Parameter(torch.ones(2)), iter(range(10_000))

    def probe() -> Tensor:
        return (w * 0).sum() + 2 + math.sin(next(clock))

    names = {name: factor * weight for name, weight in WEIGHTS.items()}
    executor = LossExecutor(names, base="fit", modulators=[monitor], probe=probe, total_steps=300)
    optimizer = torch.optim.SGD([w], lr=0.0)
    for _ in range(300):
        optimizer.zero_grad()
        executor({"fit": w.sum() ** 2, "helpful": (w[0] - 3) ** 2, "harmful": (w[1] + 2) ** 2}).backward()
        executor.step(optimizer)
    return rewards


def test_rewards_do_not_depend_on_the_scale_of_the_weights() -> None:
    one, seven = LossMonitor(), LossMonitor()
    assert rewarded(1.0, one) == rewarded(7.0, seven)
    assert one.agent.transitions == seven.agent.transitions > 20
    torch.testing.assert_close(one.nudges.residual, seven.nudges.residual)


def test_prior_follows_steady_look_aheads_and_doubts_the_rest() -> None:
    n_global, n_term = len(signal.GLOBAL_FEATURES), len(signal.TERM_FEATURES)
    rows = torch.zeros(1, n_global + 3 * n_term)
    for place, trust in enumerate((0.9, -0.7, 0.4)):
        rows[0, n_global + place * n_term + signal.TERM_FEATURES.index("trust")] = trust
    values = look_ahead_prior(rows, 0.5)[0].tolist()
    assert values == pytest.approx([0, 0, 0.4, -0.4, -0.2, 0.2, 0, 0])


def test_permuting_the_terms_permutes_values_and_prior() -> None:
    monitor = LossMonitor()
    monitor.bind(Terms(dict.fromkeys("abcd", 1.0), "a"), 100, 0)
    n_global, n_term = len(signal.GLOBAL_FEATURES), len(signal.TERM_FEATURES)
    row = torch.randn(n_global + 3 * n_term, generator=torch.Generator().manual_seed(1))
    order = [2, 0, 1]
    blocks = row[n_global:].unflatten(0, (3, n_term))[order]
    moved = torch.cat([row[:n_global], blocks.flatten()])
    places = [0, 1] + [2 + 2 * i + side for i in order for side in (0, 1)]
    torch.testing.assert_close(monitor.agent.q_values(row)[:, places], monitor.agent.q_values(moved))
    prior = look_ahead_prior(torch.stack([row, moved]), 0.5)
    torch.testing.assert_close(prior[0, places], prior[1])


def test_untrained_and_without_chance_it_lowers_a_term_that_steadily_harms() -> None:
    config = MonitorConfig()
    monitor = LossMonitor(config=replace(config, dqn=replace(config.dqn, epsilon_start=0.0, epsilon_end=0.0)))
    monitor.bind(Terms(WEIGHTS, "fit"), None, 0)
    signals = Signals(3, None)
    signals.update(torch.ones(3, dtype=torch.float64))
    gain = torch.tensor([0.0, 0.0, -0.5], dtype=torch.float64)
    for _ in range(30):
        signals.look(LookAhead(gain, gain, gain, torch.full_like(gain, 1 / 3), 1.0, GRAMIAN), 1.0)
    (event,) = monitor.after_step(context(signals, lambda: 1.0))
    assert event.reason == "lower 'harmful'"


# ---- its card -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "null",
        json.dumps({"signals_version": signal.VERSION}),
        json.dumps({"signals_version": signal.VERSION, "rho": None}),
        json.dumps({"signals_version": signal.VERSION, "rho": "high"}),
        json.dumps({"signals_version": signal.VERSION, "rho": 2.0}),
        json.dumps({"signals_version": signal.VERSION, "rho": math.nan}),
    ],
)
def test_a_damaged_card_is_refused_in_one_line_that_names_it(tmp_path: Path, text: str) -> None:
    (tmp_path / "monitor.json").write_text(text)
    with pytest.raises(ValueError, match=r"monitor\.json") as caught:
        LossMonitor.from_policy(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_missing_binary_or_foreign_card_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"monitor\.json"):
        LossMonitor.from_policy(tmp_path)
    (tmp_path / "monitor.json").write_bytes(b"\xff\x00" * 4000)
    with pytest.raises(ValueError, match=r"monitor\.json") as caught:
        LossMonitor.from_policy(tmp_path)
    assert len(str(caught.value)) < 400
    (tmp_path / "monitor.json").write_text(json.dumps({"signals_version": 99}))
    with pytest.raises(ValueError, match="signals version 99"):
        LossMonitor.from_policy(tmp_path)


def test_the_shipped_card_gives_a_monitor_in_shadow_or_at_its_evidence() -> None:
    assert 0 <= LossMonitor.from_policy(None).rho <= 1
