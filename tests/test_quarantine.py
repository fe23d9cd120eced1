"""Quarantine: an auxiliary that stays bad is left out, the run goes on, and it comes back on probation."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_executor import same
from torch import Tensor, nn

from adaptive_loss import Guards, LossExecutor
from adaptive_loss.buckets import Buckets
from adaptive_loss.losses import Terms
from adaptive_loss.quarantine import Quarantine
from adaptive_loss.step_record import StepRecord

NAN_SLOPE = "a gradient that is NaN"


class Training:
    """One parameter, a base and two auxiliaries, whose faults the test names step by step."""

    def __init__(self, base: str | None = "base", weighting: str = "fixed", apply: bool = True, **guards: Any) -> None:
        self.p = nn.Parameter(torch.tensor([0.5, -0.5]))
        start = {"base": 1.0, "x": 0.5, "y": 0.25}
        guards = {"quarantine": 3, "quarantine_steps": 4, **guards}
        self.executor = LossExecutor(start, base=base, weighting=weighting, guards=Guards(**guards), apply=apply)
        self.optimizer = torch.optim.Adam([self.p, *self.executor.parameters()], lr=1e-3)

    def losses(self, **faults: float | str) -> dict[str, Tensor]:
        plain = {"base": (self.p - 1).square().sum(), "x": self.p.square().sum() + 1, "y": self.p.abs().sum() + 1}
        for name, fault in faults.items():
            bad = (self.p - self.p.detach()).abs().sum().sqrt()
            plain[name] = plain[name] + bad if isinstance(fault, str) else plain[name] * fault
        return plain

    def step(self, **faults: float | str) -> StepRecord:
        self.optimizer.zero_grad()
        self.executor(self.losses(**faults)).backward()
        return self.executor.step(self.optimizer)

    def told(self) -> list[tuple[str, bool]]:
        """Who went out, and who came back, since the last call."""
        events = [event for event in self.executor.drain_events() if event.kind == "quarantine"]
        return [(event.details["term"], event.details["out"]) for event in events]


def outcomes(training: Training, faults: list[dict[str, float | str]]) -> list[bool]:
    return [training.step(**fault).applied for fault in faults]


# ---- out and back -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_term_that_stays_bad_is_left_out_and_the_run_goes_on_without_it(value: float) -> None:
    training = Training()
    assert outcomes(training, [{"x": value}] * 30) == [False] * 3 + [True] * 27
    assert training.executor.quarantined == ("x",) and training.told() == [("x", True)]
    record = training.step(x=value)
    assert set(record.losses) == {"base", "y"} and record.cause is None
    # What the optimizer gets is Σ wᵢ∇Lᵢ over the terms that are left.
    p = training.p
    plain = torch.autograd.grad(training.losses()["base"] + 0.25 * training.losses()["y"], [p])[0]
    training.optimizer.zero_grad()
    training.executor(training.losses(x=value)).backward()
    assert p.grad is not None and torch.equal(p.grad, plain)


def test_it_comes_back_on_probation_and_its_past_is_forgotten_in_time() -> None:
    training = Training()
    outcomes(training, [{"x": math.nan}] * 3 + [{}] * 3)
    assert training.executor.quarantined == ("x",)
    assert "x" in training.step().losses or training.executor.quarantined == ()
    assert training.told() == [("x", True), ("x", False)]
    training.step()
    assert outcomes(training, [{"x": math.nan}, {}]) == [False, True]  # on probation one bad step is enough
    assert training.executor.quarantined == ("x",)
    outcomes(training, [{}] * 3 + [{}] * 4)  # back, then healthy for as long again
    assert training.executor.quarantined == ()
    assert outcomes(training, [{"x": math.nan}] * 3) == [False] * 3 and training.executor.quarantined == ("x",)
    assert training.told() == [("x", True), ("x", False), ("x", True)]


def test_what_was_bad_now_and_then_is_forgotten() -> None:
    training = Training()
    for _ in range(5):
        outcomes(training, [{"x": math.nan}] * 2 + [{}] * 4)
    assert training.told() == []
    for _ in range(2):
        outcomes(training, [{"x": math.nan}] + [{}] * 3)
    assert training.told() == []
    training.step(x=math.nan)
    assert training.told() == [("x", True)]


def test_unhealthy_values_keep_it_out_and_an_absent_one_changes_nothing() -> None:
    training = Training()
    outcomes(training, [{}] * 20 + [{"x": 1e6}] * 3)
    assert training.told() == [("x", True)]
    outcomes(training, [{"x": 1e6}] * 200)  # far longer than the gate's window: what it judges by stays
    assert training.told() == []
    outcomes(training, [{}] * 3 + [{"x": 1e6}] + [{}] * 3)
    assert training.told() == []
    losses = training.losses()
    del losses["x"]
    training.executor(losses).backward()
    training.executor.step(training.optimizer)
    assert training.told() == []
    training.step()
    assert training.told() == [("x", False)]


def test_all_that_are_bad_at_once_are_struck_at_once() -> None:
    training = Training()
    assert outcomes(training, [{"x": math.nan, "y": math.inf}] * 6) == [False] * 3 + [True] * 3
    assert training.executor.quarantined == ("x", "y")


def test_terms_that_break_one_after_another_are_left_out_one_after_another() -> None:
    p, names = nn.Parameter(torch.ones(2)), [f"aux{i}" for i in range(8)]
    executor = LossExecutor(dict.fromkeys(["base", *names], 1.0), base="base", guards=Guards(quarantine=3))
    optimizer = torch.optim.SGD([p], lr=0.0)
    for step in range(24):
        bad = names[: 1 + step // 3]
        losses = {name: p.sum() * (math.nan if name in bad else 1.0) for name in ["base", *names]}
        executor(losses).backward()
        assert not executor.step(optimizer).applied
    assert executor.quarantined == tuple(names) and executor.skipped_steps == 24


def test_a_gradient_that_is_bad_gets_the_right_name_and_strikes_from_the_second_time_on() -> None:
    training = Training()
    records = [training.step(y=NAN_SLOPE) for _ in range(5)]
    assert [record.applied for record in records] == [False] * 4 + [True]
    assert {record.cause for record in records[:4]} == {"gradient"}
    assert [record.term for record in records[1:4]] == ["y"] * 3
    assert training.executor.quarantined == ("y",)


# ---- who stays ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("base", "bad"), [("base", ["base"]), (None, ["base", "x", "y"])])
def test_the_base_and_the_last_term_stay_and_the_run_gives_up_by_name(base: str | None, bad: list[str]) -> None:
    training = Training(base=base)
    with pytest.raises(RuntimeError, match=r"10 steps in a row.*is nan at step 0; last good values: .*none yet; try: "):
        outcomes(training, [dict.fromkeys(bad, math.nan)] * 13)  # 3 more where others were left out before


def test_terms_with_a_target_and_terms_that_are_off_are_no_auxiliaries() -> None:
    ward = Quarantine(Terms({"a": 1.0, "held": 1.0, "off": 0.0}, base="a", targets={"held": 1.0}), 1, 1)
    assert [ward.strike(i, "", 0) for i in range(3)] == [[], [], []] and not ward.out.any()


def test_without_it_ten_in_a_row_raise_as_ever() -> None:
    training = Training(quarantine=None)
    with pytest.raises(RuntimeError, match="10 steps in a row were rejected, the last one because of term 'x'"):
        outcomes(training, [{"x": math.nan}] * 10)
    assert training.executor.quarantined == ()


def test_a_batch_of_nothing_else_keeps_the_term() -> None:
    training = Training()
    outcomes(training, [{"x": math.nan}] * 3)
    for i in range(4):
        training.executor({"x": training.losses()["x"]}).backward()
        record = training.executor.step(training.optimizer)
        assert record.applied and set(record.losses) == {"x"}, i
    assert training.told() == [("x", True), ("x", False)]


def test_shadow_mode_leaves_nothing_out() -> None:
    training = Training(apply=False)
    assert all(training.step(x=math.inf).applied for _ in range(20))
    assert training.executor.quarantined == ()


def test_a_window_counts_once_and_one_ill_batch_makes_it_ill() -> None:
    training = Training()
    training.step()

    def window(*parts: dict[str, float | str]) -> bool:
        training.optimizer.zero_grad()
        for part in parts:
            (training.executor(training.losses(**part)) / len(parts)).backward()
        return training.executor.step(training.optimizer).applied

    bad: dict[str, float | str] = {"x": math.nan}
    assert [window(bad, bad, {}), window({}, bad), window({}, {}), window({}, bad)] == [False, False, True, False]
    assert training.executor.quarantined == ("x",)
    assert all(window({}, bad) for _ in range(20)) and training.executor.quarantined == ("x",)
    assert all(window({}, {}) for _ in range(4)) and training.executor.quarantined == ()


def test_a_bucket_that_jumps_is_left_out_like_a_term() -> None:
    p = nn.Parameter(torch.ones(3))
    executor = LossExecutor({"0": 1.0, "1": 1.0, "2": 1.0}, guards=Guards(quarantine=2))
    optimizer = torch.optim.SGD([p], lr=0.0)
    for step in range(25):
        optimizer.zero_grad()
        means = torch.stack([p[0], p[1] * (1e6 if step >= 20 else 1.0), p[2]])
        executor(Buckets(means, torch.ones(3, dtype=torch.bool))).backward()
        assert executor.step(optimizer).applied == (step not in (20, 21))
    assert executor.quarantined == ("1",) and p.grad is not None and p.grad.tolist() == [1.0, 0.0, 1.0]


# ---- resume and laws ----------------------------------------------------------------------------------------------


def sequence() -> list[dict[str, float | str]]:
    """Eighty steps in spells of four to seven, each of its own kind."""
    kinds: list[dict[str, float | str]] = [{}, {"x": math.nan}, {"y": NAN_SLOPE}, {"x": math.inf, "y": math.nan}]
    spells = [
        (0, 4),
        (1, 5),
        (2, 6),
        (0, 7),
        (3, 5),
        (0, 5),
        (2, 7),
        (1, 4),
        (0, 6),
        (1, 4),
        (0, 5),
        (3, 6),
        (2, 6),
        (0, 10),
    ]
    return [kinds[kind] for kind, length in spells for _ in range(length)]


@pytest.mark.parametrize("weighting", ["fixed", "dwa", "uncertainty"])
def test_a_restart_at_any_step_continues_bit_for_bit(weighting: str) -> None:
    faults = sequence()
    whole = Training(weighting=weighting)
    states, outs = [], []
    for fault in faults:
        file = io.BytesIO()
        torch.save([whole.p.data.clone(), whole.executor.state_dict(), whole.optimizer.state_dict()], file)
        states.append(file.getvalue())
        whole.step(**fault)
        outs.append(whole.executor.quarantined)
    assert len(set(outs)) == 4  # nobody, either, both
    for cut in range(0, 80, 7):
        again = Training(weighting=weighting)
        p, executor, optimizer = torch.load(io.BytesIO(states[cut]), weights_only=True)
        again.p.data.copy_(p)
        again.executor.load_state_dict(executor)
        again.optimizer.load_state_dict(optimizer)
        outcomes(again, faults[cut:])
        assert torch.equal(again.p, whole.p) and same(
            dict(again.executor.state_dict()), dict(whole.executor.state_dict())
        )


def test_a_state_with_or_without_it_loads_where_it_is_off_or_on() -> None:
    on, off = Training(), Training(quarantine=None)
    outcomes(on, [{"x": math.nan}] * 3)
    off.executor.load_state_dict(on.executor.state_dict())
    assert off.executor.quarantined == ()
    fresh = Training()
    fresh.executor.load_state_dict(off.executor.state_dict())
    assert fresh.executor.quarantined == ()


faults = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60)


@settings(max_examples=40, deadline=None)
@given(faults, st.integers(1, 5), st.integers(1, 6))
def test_a_healthy_base_trains_on_whatever_the_auxiliaries_do(
    told: list[tuple[bool, bool]], after: int, steps: int
) -> None:
    """Against the rule in plain words: strikes, quarantine, probation; two auxiliaries have ten strikes in all."""
    training = Training(quarantine=after, quarantine_steps=steps)
    out, strikes, calm = {"x": False, "y": False}, {"x": 0, "y": 0}, {"x": 0, "y": 0}
    for bad in (dict(zip("xy", pair, strict=True)) for pair in told):
        rejected = any(ill and not out[name] for name, ill in bad.items())
        record = training.step(**{name: math.nan for name, ill in bad.items() if ill})
        assert record.applied is not rejected
        for name, ill in bad.items():
            if rejected and ill and not out[name]:
                strikes[name], calm[name] = strikes[name] + 1, 0
                out[name] = strikes[name] >= after
                strikes[name] -= out[name]
            elif not rejected:
                calm[name] = 0 if ill else calm[name] + 1
                if calm[name] == steps:
                    strikes[name], calm[name] = strikes[name] if out[name] else 0, 0
                    out[name] = False
        assert training.executor.quarantined == tuple(name for name in "xy" if out[name])
    assert bool(torch.isfinite(training.p).all())


def test_the_whole_system_takes_guards_as_well() -> None:
    with pytest.warns(UserWarning, match="no probe was given"):
        executor = LossExecutor.adaptive({"a": 1.0, "b": 1.0}, base="a", guards=Guards(quarantine=1))
    p = nn.Parameter(torch.ones(2))
    executor({"a": p.sum(), "b": p.sum() * math.nan}).backward()
    assert not executor.step(torch.optim.SGD([p], lr=0.0)).applied and executor.quarantined == ("b",)


@pytest.mark.parametrize("kwargs", [{"quarantine": 0}, {"quarantine": 10}, {"quarantine_steps": 0}])
def test_bad_settings(kwargs: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=rf"Guards\.{next(iter(kwargs))} is {next(iter(kwargs.values()))}"):
        Guards(**kwargs)
