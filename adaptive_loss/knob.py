"""One controller for every set-point: observed scalar → error → law → bounded knob."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from adaptive_loss.events import Event

Law = Callable[[float, float, float], tuple[float, float]]
"""(value, integral, error) → where the law wants the knob, and its integral. Pure; the error is observed − target."""

PART = 10
"""Of a knob's steps, the part that it has to have stood at a bound for its target to count as out of reach."""
_STATE = ("value", "integral", "average", "seen", "stuck")


@dataclass(frozen=True)
class Limits:
    """What a knob may do, whatever its law wants.

    Args:
        bounds: least and greatest value.
        slew: greatest change a step, in nats where ``in_log``; None for no limit.
        in_log: the slew limit counts in log(value), for knobs that span magnitudes.
        dead_band: an error of at most this size moves nothing.
        warmup: so many observations at first teach the average and move nothing.
        alarm_after: steps at a bound, with the law pushing further out, after which the alarm sounds; None for never.
        rest: a bound that is a fine place to stay, so that no alarm sounds there.

    Raises:
        ValueError: bounds that are not in order, a slew limit or a number of steps that is not positive, and so on.
    """

    bounds: tuple[float, float] = (0.0, 1.0)
    slew: float | None = None
    in_log: bool = False
    dead_band: float = 0.0
    warmup: int = 0
    alarm_after: int | None = 1000
    rest: float | None = None

    def __post_init__(self) -> None:
        low, high = self.bounds
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ValueError(f"Limits.bounds is {self.bounds}: give two finite numbers, the least first")
        if self.slew is not None and not self.slew > 0:
            raise ValueError(f"Limits.slew is {self.slew}: give a positive change a step, or None")
        if self.in_log and not low > 0:
            raise ValueError(f"Limits.bounds is {self.bounds}: with in_log=True the least value must be positive")
        if not (self.dead_band >= 0 and self.warmup >= 0):
            raise ValueError("Limits.dead_band and Limits.warmup must be at least 0")
        if self.alarm_after is not None and self.alarm_after < 1:
            raise ValueError(f"Limits.alarm_after is {self.alarm_after}: give a number of steps, or None")

    def reached(self, value: float, wanted: float) -> float:
        """How far a knob gets from ``value`` towards ``wanted`` in one step."""
        if self.slew is not None:
            # Beyond 700 nats there is no number to reach, and none above the slew limit either.
            factor = math.exp(min(self.slew, 700.0))
            low, high = (value / factor, value * factor) if self.in_log else (value - self.slew, value + self.slew)
            wanted = _clip(wanted, low, high)
        return _clip(wanted, *self.bounds)


@dataclass(frozen=True)
class Saturation:
    """A knob that has stood at a bound for long, its law still pushing.

    Args:
        knob: its name.
        bound: where it stands.
        observed, target: what the law sees, and what it wants to see.
        steps: how long the knob has stood there.
    """

    knob: str
    bound: float
    observed: float
    target: float
    steps: int

    def __str__(self) -> str:
        return (
            f"{self.knob} has been at its bound {self.bound:g} for {self.steps} steps while {self.observed:g} is "
            f"observed and {self.target:g} is wanted: widen the bounds or move the target"
        )


def reported(alarms: list[Saturation], step: int) -> list[Event]:
    """The alarms as events; the list is emptied."""
    events = [Event(step, "alarm", str(alarm), asdict(alarm)) for alarm in alarms]
    alarms.clear()
    return events


def unreached(knobs: Mapping[str, Knob]) -> dict[str, str]:
    """Those of the knobs whose target cannot be reached, each with the reason."""
    return {name: reason for name, knob in knobs.items() if (reason := knob.unreached) is not None}


def _warn(alarm: Saturation) -> None:
    warnings.warn(f"adaptive_loss: {alarm}", stacklevel=4)


class Knob:
    """A number that a law turns until an observed scalar is at its target: a weight, or anything else.

    error = scale·(observed − target), averaged; (wanted, integral) = law(value, integral, error);
    value = wanted within slew limit and bounds. Anti-windup: while the value cannot follow (at a bound, or slew
    limited) and the integral would push it further the same way, the integral stays. An observation that is not finite
    changes nothing.

    Args:
        law: what the knob does about an error.
        target: what the observed scalar should be.
        value: where the knob starts, within its bounds.
        name: what the alarm calls it.
        scale: unit of the error: 1 for the observed one's own, 1/|target| for a relative error.
        decay: of the error's running average, which starts at the first error; 0 for the error itself.
        integral: where the law's integral starts.
        limits: bounds, slew limit, dead band, warm-up and alarm.
        on_change: called with every new value, a loaded one included, so that the knob can be any number elsewhere.
        on_alarm: called once a stay at a bound; warns by default.

    Example:
        >>> from functools import partial
        >>> group = {"lr": 0.1}
        >>> knob = Knob(partial(ada, rate=0.01), target=0.6, value=0.1, on_change=lambda lr: group.update(lr=lr))
        >>> round(knob.observe(0.9), 4), group == {"lr": knob.value}, knob.observe(float("nan")) == knob.value
        (0.11, True, True)
    """

    def __init__(
        self,
        law: Law,
        *,
        target: float,
        value: float,
        name: str = "knob",
        scale: float = 1.0,
        decay: float = 0.0,
        integral: float = 0.0,
        limits: Limits = Limits(),
        on_change: Callable[[float], None] | None = None,
        on_alarm: Callable[[Saturation], None] = _warn,
    ) -> None:
        low, high = limits.bounds
        if not low <= value <= high:
            raise ValueError(f"{name} starts at {value}, outside its bounds {limits.bounds}")
        if not 0 <= decay < 1:
            raise ValueError(f"the decay of {name} is {decay}: give a number in [0, 1)")
        self.law, self.target, self.name, self.scale, self.decay = law, float(target), name, scale, decay
        self.limits, self.on_change, self.on_alarm = limits, on_change, on_alarm
        self.value, self.integral = float(value), float(integral)
        self.average = math.nan
        self.seen = self.stuck = 0

    def observe(self, observed: float) -> float:
        """Take in one observation and turn the knob; returns its value."""
        observed = float(observed)
        error = self.scale * (observed - self.target)
        if not math.isfinite(error):
            return self.value
        known = not math.isnan(self.average)
        self.average = self.decay * self.average + (1 - self.decay) * error if known else error
        self.seen += 1
        if self.seen <= self.limits.warmup:
            return self.value
        if abs(self.average) <= self.limits.dead_band:
            self.stuck = 0
            return self.value
        self._turn(observed)
        return self.value

    def _turn(self, observed: float) -> None:
        wanted, integral = self.law(self.value, self.integral, self.average)
        if not (math.isfinite(wanted) and math.isfinite(integral)):
            return
        value = self.limits.reached(self.value, wanted)
        if not _winds_up(wanted, value, integral, self.integral):
            self.integral = integral
        self._set(value)
        low, high = self.limits.bounds
        self._watch(observed, (wanted < low and value == low) or (wanted > high and value == high))

    @property
    def unreached(self) -> str | None:
        """Why the target cannot be reached, or None: it stands at a bound for a tenth of its steps, or has alarmed."""
        patience = min(self.seen / PART, self.limits.alarm_after or math.inf)
        if not self.stuck or self.stuck < patience or self.value == self.limits.rest:
            return None
        observed = self.target + self.average / self.scale
        return str(Saturation(self.name, self.value, observed, self.target, self.stuck))

    def _set(self, value: float) -> None:
        changed, self.value = value != self.value, value
        if changed and self.on_change is not None:
            self.on_change(value)

    def _watch(self, observed: float, pushes_out: bool) -> None:
        self.stuck = self.stuck + 1 if pushes_out else 0
        if self.stuck == self.limits.alarm_after and self.value != self.limits.rest:
            self.on_alarm(Saturation(self.name, self.value, observed, self.target, self.stuck))

    def state_dict(self) -> dict[str, Any]:
        """Everything that must survive a restart, as numbers."""
        return {key: getattr(self, key) for key in _STATE}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`; ``on_change`` hears of another value."""
        for key in _STATE[1:]:
            setattr(self, key, state[key])
        self._set(state["value"])


def _winds_up(wanted: float, value: float, integral: float, before: float) -> bool:
    """Whether the integral would grow away from a value that cannot follow."""
    return (wanted > value and integral > before) or (wanted < value and integral < before)


def _clip(value: float, low: float, high: float) -> float:
    return max(low, min(high, value))


def geco(
    value: float, integral: float, error: float, *, speed: float = 0.01, limit: float = 0.1
) -> tuple[float, float]:
    """λ ← λ·exp(clip(s·C̄, ±limit)) with C̄ the constraint's running average (Rezende & Viola 2018, algorithm 1).

    Args:
        value, integral, error: λ, unused, and C̄ > 0 where the constraint is broken.
        speed, limit: s, and the greatest step in nats.

    Example:
        >>> geco(2.0, 0.0, 3.0, speed=0.01)[0]  # 2·exp(0.03)
        2.060909067907034
    """
    return value * math.exp(_clip(speed * error, -limit, limit)), integral


def pi(
    value: float,  # noqa: ARG001 - every law is called alike
    integral: float,
    error: float,
    *,
    proportional: float = 0.01,
    integral_gain: float = 1e-4,
) -> tuple[float, float]:
    """β = Kp/(1 + exp(e)) + I, I ← I − Ki·e with e = −error = target − observed (Shao et al. 2020, algorithm 1).

    Args:
        value, integral, error: unused, I, and observed − target.
        proportional, integral_gain: Kp and Ki, both positive (public code writes Ki with a minus sign).

    Example:
        >>> pi(0.0, 0.2, 0.0)  # on target: Kp/2 + I
        (0.20500000000000002, 0.2)
    """
    integral = integral + integral_gain * error
    # Beyond ±40 the sigmoid is 0 or 1 to the last bit that counts, and exp() cannot overflow.
    return proportional / (1 + math.exp(_clip(-error, -40.0, 40.0))) + integral, integral


def ada(value: float, integral: float, error: float, *, rate: float) -> tuple[float, float]:
    """p ← p + sign(error)·rate (Karras et al. 2020)."""
    return value + ((error > 0) - (error < 0)) * rate, integral


def adaptive_kl(
    value: float, integral: float, error: float, *, share: float = 0.0064, clip: float = 0.2
) -> tuple[float, float]:
    """β ← β·(1 + clip(KL/target − 1, ±0.2)·n/horizon) (Ziegler et al. 2019).

    Args:
        value, integral, error: β, unused, and the relative error KL/target − 1.
        share, clip: n/horizon and the greatest relative error that counts.

    Example:
        >>> adaptive_kl(0.2, 0.0, 0.1, share=0.05)[0]  # 0.2·(1 + 0.1·0.05)
        0.20099999999999998
    """
    return value * (1 + _clip(error, -clip, clip) * share), integral


def log_weight(
    value: float, integral: float, error: float, *, target: float, rate: float = 0.05, limit: float = 0.1
) -> tuple[float, float]:
    """log w ← log w + clip(η·log(L/τ), ±δ), the difference over |τ| where one is not positive (Rezende & Viola 2018).

    Args:
        value, integral, error: log w, unused, and L − τ.
        target: τ.
        rate, limit: η per step, and δ, the greatest step in nats.

    Example:
        >>> log_weight(1.0, 0.0, 2.0, target=2.0)[0]  # 1 + 0.05·log 2
        1.0346573590279973
    """
    observed = error + target
    positive = observed > 0 and target > 0
    relative = math.log(observed / target) if positive else error / max(abs(target), 1e-12)
    return value + _clip(rate * relative, -limit, limit), integral
