"""Knob: its laws by hand, and what every law gets from it: bounds, slew, dead band, warm-up, anti-windup, alarm."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptive_loss.knob import Knob, Limits, Saturation, ada, adaptive_kl, geco, log_weight, pi

LAWS = {
    "geco": partial(geco, speed=0.05),
    "pi": partial(pi, proportional=0.01, integral_gain=0.01),
    "ada": partial(ada, rate=0.01),
    "adaptive_kl": partial(adaptive_kl, share=0.1),
}
WIDE = Limits((1e-3, 10.0))


def plant(value: float, target: float = 2.0) -> float:
    """A loss that falls as its weight rises; it is at ``target`` where the weight is ½."""
    return target * 3 / (1 + 4 * value)


def run(knob: Knob, steps: int, observed: Callable[[float], float] = plant) -> list[float]:
    return [knob.observe(observed(knob.value)) for _ in range(steps)]


# ---- the laws, away from where they start ---------------------------------------------------------------------------


def test_geco_by_hand():
    # Rezende & Viola 2018, algorithm 1, in log form: λ·exp(s·C̄), and the step clipped at ±0.1.
    assert geco(2.0, 0.0, 3.0, speed=0.01) == (2 * math.exp(0.03), 0.0)
    assert geco(2.0, 0.0, 1e10)[0] == 2 * math.exp(0.1) and geco(2.0, 0.0, -1e10)[0] == 2 * math.exp(-0.1)


def test_pi_as_in_the_public_code_of_control_vae():
    # shj1987/ControlVAE-ICML2020, Image_generation/PID.py with Kp = 0.01, Ki = −0.001, KL* = 18, KL = 20, I = 0.3:
    # Pk = 0.01/(1 + exp(−2)), Ik = 0.3 − 0.001·(−2).
    value, integral = pi(0.7, 0.3, 2.0, proportional=0.01, integral_gain=0.001)
    assert integral == pytest.approx(0.302) and value == pytest.approx(0.01 / (1 + math.exp(-2)) + 0.302)


@pytest.mark.parametrize("error", [1e10, -1e10, 1e300, -1e300])
def test_pi_does_not_overflow(error):
    value, integral = pi(0.0, 0.0, error)
    assert math.isfinite(value) and math.isfinite(integral)


def test_ada_is_a_sign():
    # Karras et al. 2020; 64·4/500k is the step of batches of 64 every 4 minibatches.
    assert ada(0.2, 0.0, 0.3, rate=64 * 4 / 500_000)[0] == pytest.approx(0.200512)
    assert ada(0.2, 0.0, -1e-9, rate=0.1)[0] == pytest.approx(0.1) and ada(0.2, 0.0, 0.0, rate=0.1)[0] == 0.2


def test_adaptive_kl_as_in_the_public_code():
    # openai/lm-human-preferences, AdaptiveKLController: 0.2·(1 + clip(9/6 − 1, ±0.2)·512/10000), then KL 5.7.
    value = adaptive_kl(0.2, 0.0, 9 / 6 - 1, share=0.0512)[0]
    assert value == pytest.approx(0.2 * (1 + 0.2 * 0.0512))
    assert adaptive_kl(value, 0.0, 5.7 / 6 - 1, share=0.0512)[0] == pytest.approx(value * (1 - 0.05 * 0.0512))


# ---- closed loop ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("start", [0.01, 0.5, 9.0])
def test_every_law_holds_the_target(name, start):
    knob = Knob(LAWS[name], target=2.0, value=start, integral=start, limits=WIDE)
    run(knob, 3000)
    assert knob.value == pytest.approx(0.5, abs=0.011) and plant(knob.value) == pytest.approx(2.0, rel=0.02)


@pytest.mark.parametrize("name", LAWS)
def test_every_law_recovers_from_saturation_at_once(name):
    alarms: list[Saturation] = []
    limits = Limits((0.01, 1.0), alarm_after=100)
    knob = Knob(LAWS[name], target=2.0, value=0.5, integral=0.5, limits=limits, on_alarm=alarms.append)
    run(knob, 5000, lambda _: 4.0)  # no weight lowers this loss
    assert knob.value == 1.0 and len(alarms) == 1
    knob.observe(1.0)
    assert knob.value < 1.0, "it must leave the bound on the first step that asks for it"
    run(knob, 3000)
    assert plant(knob.value) == pytest.approx(2.0, rel=0.02)


def test_anti_windup_where_w_below_0_and_w_at_least_1_never_fires():
    # The public code freezes its integral `if W < 0 and W >= 1`, which no W is: 3000 steps too high, then too low.
    errors = [5.0] * 3000 + [-5.0] * 3000
    integral, public = 0.0, []
    for error in errors:
        integral += 1e-3 * error
        public.append(min(1.0, max(0.0, 0.01 / (1 + math.exp(-error)) + integral)))
    knob = Knob(partial(pi, integral_gain=1e-3), target=0.0, value=0.0, limits=Limits(alarm_after=None))
    ours = [knob.observe(error) for error in errors]
    assert public[2999] == ours[2999] == 1.0
    assert public[5700] == 1.0, "the public integral needs about as long to unwind as it had to wind up"
    assert ours[3000] < 1.0 and ours[3250] == 0.0
    assert knob.integral == pytest.approx(0.0, abs=0.01)


def test_the_integral_does_not_wind_up_at_the_lower_bound():
    knob = Knob(LAWS["pi"], target=2.0, value=0.0, limits=Limits(alarm_after=None))
    run(knob, 2000, lambda _: 0.5)
    assert knob.value == 0.0 and knob.integral == 0.0
    assert knob.observe(3.0) > 0.0


def test_the_integral_does_not_run_ahead_of_a_slew_limited_knob():
    knob = Knob(LAWS["pi"], target=0.0, value=0.0, limits=Limits(slew=1e-3))
    values = run(knob, 100, lambda _: 50.0)  # wants half the range a step
    assert max(b - a for a, b in zip([0.0, *values], values, strict=False)) == pytest.approx(1e-3)
    assert knob.integral <= knob.value + 0.5
    assert knob.observe(-50.0) < values[-1]


# ---- what the knob sees to ------------------------------------------------------------------------------------------


def test_bounds_and_slew():
    assert Limits((0.0, 2.0)).reached(1.0, 9.0) == 2.0 and Limits((0.0, 2.0)).reached(1.0, -9.0) == 0.0
    assert Limits((0.0, 2.0), slew=0.25).reached(1.0, 9.0) == 1.25
    log = Limits((0.1, 1e6), slew=math.log(2), in_log=True)
    assert log.reached(3.0, 100.0) == pytest.approx(6.0) and log.reached(3.0, 0.2) == pytest.approx(1.5)


def test_dead_band():
    knob = Knob(LAWS["pi"], target=2.0, value=0.3, integral=0.3, limits=Limits(dead_band=0.1))
    before = knob.value, knob.integral
    assert run(knob, 50, lambda _: 2.09) == [0.3] * 50 and (knob.value, knob.integral) == before
    assert knob.observe(2.11) != 0.3


def test_warm_up_teaches_the_average_and_moves_nothing():
    knob = Knob(LAWS["geco"], target=2.0, value=1.0, decay=0.5, limits=Limits((1e-3, 10.0), warmup=3))
    assert [knob.observe(x) for x in (10.0, 6.0, 4.0)] == [1.0] * 3
    assert knob.average == 4.0  # ((8 + 4)/2 + 2)/2
    assert knob.observe(2.0) == math.exp(0.05 * 2.0)  # the average is 2 by now


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", LAWS)
def test_what_is_not_finite_changes_nothing(name, bad):
    knob = Knob(LAWS[name], target=2.0, value=0.3, decay=0.9, limits=WIDE)
    run(knob, 5)
    before = knob.state_dict()
    assert knob.observe(bad) == knob.value and knob.state_dict() == before


def test_the_alarm_names_knob_bound_and_observed_value_once_a_stay():
    alarms: list[Saturation] = []
    knob = Knob(LAWS["ada"], target=0.0, value=0.5, name="p", limits=Limits(alarm_after=20), on_alarm=alarms.append)
    run(knob, 500, lambda _: 7.5)
    assert alarms == [Saturation("p", 1.0, 7.5, 0.0, 20)]
    assert "p has been at its bound 1 for 20 steps while 7.5 is observed and 0 is wanted" in str(alarms[0])
    run(knob, 500, lambda _: -7.5)
    assert [alarm.bound for alarm in alarms] == [1.0, 0.0]


def test_the_alarm_warns_by_default_and_is_silent_at_rest_or_switched_off():
    with pytest.warns(UserWarning, match="at its bound 1 for 5 steps"):
        run(Knob(LAWS["ada"], target=0.0, value=1.0, limits=Limits(alarm_after=5)), 9, lambda _: 1.0)
    loud: list[Saturation] = []
    for limits in (Limits(alarm_after=5, rest=1.0), Limits(alarm_after=None)):
        run(Knob(LAWS["ada"], target=0.0, value=1.0, limits=limits, on_alarm=loud.append), 2000, lambda _: 1.0)
    assert not loud


def test_a_knob_at_its_bound_and_on_target_is_not_stuck():
    alarms: list[Saturation] = []
    knob = Knob(LAWS["ada"], target=0.0, value=1.0, limits=Limits(alarm_after=5), on_alarm=alarms.append)
    for observed in [1.0, 1.0, 1.0, 0.0] * 20:
        knob.observe(observed)
    assert not alarms


def test_on_change_turns_any_number():
    group, heard = {"lr": 0.3}, []

    def hear(value: float) -> None:
        group["lr"] = value
        heard.append(value)

    knob = Knob(LAWS["geco"], target=2.0, value=0.3, limits=WIDE, on_change=hear)
    knob.observe(2.0)
    assert not heard, "on target nothing changes"
    knob.observe(3.0)
    assert heard == [knob.value] == [group["lr"]]
    other = Knob(LAWS["geco"], target=2.0, value=0.3, limits=WIDE, on_change=hear)
    group["lr"] = 0.3
    other.load_state_dict(knob.state_dict())
    assert group["lr"] == knob.value, "a loaded value reaches the number too"


@pytest.mark.parametrize("name", LAWS)
def test_a_loaded_knob_continues_bit_for_bit(name):
    def fresh() -> Knob:
        limits = Limits((1e-3, 10.0), slew=0.02, warmup=4, dead_band=1e-3)
        return Knob(LAWS[name], target=2.0, value=0.1, integral=0.1, decay=0.9, limits=limits)

    whole, first, second = fresh(), fresh(), fresh()
    path = run(whole, 40)
    head = run(first, 17)
    second.load_state_dict(first.state_dict())
    assert head + run(second, 23) == path and second.state_dict() == whole.state_dict()


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(sorted(LAWS)),
    st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=30),
    st.floats(1e-10, 1e10),
    st.sampled_from([None, 1e-3, 1e3]),
)
def test_any_observations_leave_a_finite_value_within_bounds_and_slew(name, observations, scale, slew):
    limits = Limits((1e-3, 10.0), slew=slew, alarm_after=None)
    knob = Knob(LAWS[name], target=1.0, value=0.5, scale=scale, decay=0.5, limits=limits)
    for observed in observations:
        before = knob.value
        value = knob.observe(observed)
        assert 1e-3 <= value <= 10.0
        assert slew is None or abs(value - before) <= slew * (1 + 1e-9) + 1e-15


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"bounds": (1.0, 1.0)}, "the least first"),
        ({"bounds": (0.0, math.inf)}, "finite"),
        ({"slew": 0.0}, "slew"),
        ({"slew": 0.1, "in_log": True}, "in_log"),
        ({"dead_band": -1.0}, "dead_band"),
        ({"warmup": -1}, "warmup"),
        ({"alarm_after": 0}, "alarm_after"),
    ],
)
def test_limits_that_cannot_be(wrong, message):
    with pytest.raises(ValueError, match=message):
        Limits(**wrong)


def test_knobs_that_cannot_be():
    with pytest.raises(ValueError, match="outside its bounds"):
        Knob(LAWS["ada"], target=0.0, value=2.0)
    with pytest.raises(ValueError, match="decay"):
        Knob(LAWS["ada"], target=0.0, value=0.0, decay=1.0)


def test_a_loss_that_improves_by_itself_is_held_off_its_target_by_its_pace_over_the_rate() -> None:
    """The plant is L = e^(−0.002·t)·w^−1, whose target asks for a weight that falls by 0.002 nats a step."""
    for rate in (0.02, 0.05):
        law = partial(log_weight, target=1.0, rate=rate)
        knob = Knob(law, target=1.0, value=0.0, limits=Limits((-9.0, 9.0)))
        for step in range(2000):
            loss = math.exp(-0.002 * step - knob.value)
            knob.observe(loss)
        assert math.log(loss) == pytest.approx(-0.002 / rate, rel=0.01)
