"""Terms that come on late and safely, and terms that are lowered when they no longer help."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adaptive_loss import LossExecutor, MetaController
from adaptive_loss.weighting.switch_on import SwitchOn, capped_by_share, ramp
from adaptive_loss.weighting.vqgan import VQGAN
from adaptive_loss.weighting.wind_down import WindDown

NAMES = {"rec": 1.0, "adv": 1.0}


class Run:
    """An executor over two terms of one parameter that stays put, so that losses and gradients are what is asked."""

    def __init__(self, rule: Any, **options: Any) -> None:
        self.executor = LossExecutor(NAMES, base="rec", weighting=rule, **options)
        self.w = nn.Parameter(torch.tensor([1.0, 0.0]))
        self.optimizer = torch.optim.SGD([self.w], lr=0.0)
        self.events: list[Any] = []

    def step(self, rec: float = 1.0, adv: float = 1.0, angle: float = 0.0, tap: bool = False) -> float:
        """One step; the gradients have lengths ``rec`` and ``adv`` and ``angle`` between them. The weight of adv."""
        turned = torch.tensor([math.cos(angle), math.sin(angle)])
        losses: dict[str, Tensor] = {"rec": rec * self.w[0], "adv": adv * (self.w @ turned)}
        self.executor(losses, tap=self.w if tap else None).backward()
        record = self.executor.step(self.optimizer)
        assert record.applied
        self.events += [event for event in record.events if event.kind == "switch"]
        return record.weights["adv"]


def test_ramp_by_hand() -> None:
    assert [ramp(step, 10, 4) for step in (10, 11, 13, 20)] == [0.25, 0.5, 1.0, 1.0]
    assert ramp(10, 10, 0) == 1.0


def test_the_cap_makes_the_share() -> None:
    weights, norms = torch.tensor([1.0, 5.0, 2.0]), torch.tensor([3.0, 7.0, 1.0])
    weight = capped_by_share(weights, norms, 1, 0.2)
    assert weight * 7 / (weight * 7 + 3 + 2) == pytest.approx(0.2)
    assert capped_by_share(torch.ones(2), torch.tensor([1.0, 0.0]), 1, 0.5) == math.inf


def test_armed_at_a_step_and_ramped() -> None:
    run = Run(SwitchOn(2, "adv", at=3, ramp=2))
    seen = [run.step() for _ in range(7)]
    assert seen == pytest.approx([0, 0, 0, 0.5, 1, 1, 1], abs=1e-11)
    assert [(event.step, event.reason) for event in run.events] == [(3, "'adv' comes on")]


def test_armed_at_an_epoch_and_by_a_condition() -> None:
    calm = {"now": False}
    run = Run(SwitchOn(2, "adv", epoch=1, when=lambda context: calm["now"]))
    run.step()
    run.executor.end_epoch()
    assert [run.step(), run.step()] == pytest.approx([0, 0], abs=1e-11)
    calm["now"] = True
    run.step()
    assert run.step() == 1.0


def test_its_share_of_the_gradient_is_capped() -> None:
    run = Run(SwitchOn(2, "adv", at=0, share=0.25))
    run.step(tap=True)
    weight = run.step(rec=2.0, adv=30.0, tap=True)
    assert weight * 30 / (weight * 30 + 2) == pytest.approx(0.25)
    assert run.step(rec=2.0, adv=0.1, tap=True) == 1.0


@pytest.mark.parametrize("length", [0.01, 1.0, 100.0])
def test_its_share_is_capped_after_the_other_rules_of_a_product(length: float) -> None:
    # The adaptive weight makes the two gradients alike but for its factor .8: 44% of the whole, whatever the lengths.
    run = Run(SwitchOn(2, "adv", at=0, share=0.3) * VQGAN(2))
    run.step(adv=length, tap=True)
    weight = run.step(adv=length, tap=True)
    assert weight * length / (weight * length + 1) == pytest.approx(0.3, rel=1e-3)


def test_a_term_that_waits_is_no_clamp_and_no_alarm_and_winds_nothing_up() -> None:
    controller = MetaController()
    run = Run(SwitchOn(2, "adv", at=30), modulators=[controller], probe=lambda: probe(run), total_steps=60)
    told = []
    for _ in range(30):
        assert run.step(angle=1.0) == 0.0
        told += [event.kind for event in run.executor.drain_events()]
    assert set(told) <= {"controller", "switch"}
    assert controller.gains().tolist() == [0.0, 0.0]
    assert run.step(angle=1.0) == 1.0


def probe(run: Run) -> Tensor:
    return (run.w - 3.0).square().sum()


def test_a_bound_needs_a_base_and_an_epoch_is_waited_for() -> None:
    executor = LossExecutor(NAMES, weighting=SwitchOn(2, "adv", at=1, bound=1.5))
    with pytest.raises(ValueError, match="needs base"):
        executor({"rec": torch.ones((), requires_grad=True)})
    assert SwitchOn(2, "adv", epoch=5).needs == ("a term", "epochs")
    assert WindDown(2, "adv", stall=5).needs == ("a term", "epochs")


def test_steps_without_evidence_do_not_count_as_opposition() -> None:
    run = Run(WindDown(2, "adv", opposed=3))
    for _ in range(2):
        run.step(angle=3.0, tap=True)
    for _ in range(10):
        assert run.step(rec=0.0, angle=3.0, tap=True) == 1.0
    assert run.events == []


def test_taken_back_when_the_base_worsens_and_back_later_each_time() -> None:
    run = Run(SwitchOn(2, "adv", at=2, bound=1.5, rest=5))
    weights = [run.step(rec=1.0) for _ in range(4)] + [run.step(rec=3.0) for _ in range(60)]
    reasons = [event.reason for event in run.events]
    assert reasons[:3] == ["'adv' comes on", "'adv' goes off: the base worsened", "'adv' comes on"]
    off = run.events[1]
    assert off.details["after"] > 1.5 * off.details["before"] and off.details["rest"] == 5
    assert run.events[2].step - off.step == 5
    # From there on the base is as bad as it was at the second switch, so the term stays.
    assert weights[-1] == 1.0 and len(run.events) == 3


def test_an_opponent_trains_before() -> None:
    rule = SwitchOn(2, "adv", at=4, lead=2)
    run = Run(rule)
    told = []
    for _ in range(6):
        run.step()
        told.append(rule.opponent)
    assert told == [False, True, True, True, True, True]


def test_lowered_when_it_opposes_the_base() -> None:
    run = Run(WindDown(2, "adv", opposed=3, decay=0.1))
    weights = [run.step(angle=3.0, tap=True) for _ in range(7)]
    # Three steps of opposition, then a factor of ten at no more than a nat a step.
    assert weights[:6] == pytest.approx([1, 1, 1, math.exp(-1), math.exp(-2), 0.1])
    assert run.events[0].reason == "'adv' is lowered: opposed the base for 3 steps"
    helped = Run(WindDown(2, "adv", opposed=3, decay=0.1))
    assert [helped.step(angle=0.5, tap=True) for _ in range(20)] == [1.0] * 20


def test_one_opposed_batch_among_helpful_ones_lowers_nothing() -> None:
    run = Run(WindDown(2, "adv", opposed=2))
    assert [run.step(angle=3.0 if i % 5 == 4 else 0.0, tap=True) for i in range(20)] == [1.0] * 20


@pytest.mark.parametrize(("metric", "values"), [("select_loss", [3, 2, 2, 2, 1]), ("select_accuracy", [1, 2, 2, 2, 3])])
def test_lowered_when_the_metric_stalls(metric: str, values: list[float]) -> None:
    run = Run(WindDown(2, "adv", stall=2, metric=metric))
    weights = []
    for value in values:
        weights.append(run.step())
        run.executor.end_epoch(**{metric: float(value)})
    weights.append(run.step())
    run.executor.end_epoch(**{metric: math.nan})  # what is not known does not count
    assert weights == [1.0, 1.0, 1.0, 1.0, 1.0, 0.5]


@pytest.mark.parametrize(
    "build",
    [
        lambda: SwitchOn(2, "adv", at=3, ramp=5, bound=1.5, rest=4, share=0.4),
        lambda: WindDown(2, "adv", opposed=2, stall=1, decay=0.7),
    ],
)
def test_a_restart_changes_nothing(build: Any) -> None:
    def drive(run: Run, steps: range) -> list[float]:
        seen = []
        for i in steps:
            seen.append(run.step(rec=1.0 + (i > 8), angle=2.0 + i % 2, tap=True))
            run.executor.end_epoch(select_loss=1.0)
        return seen

    whole, first, second = Run(build()), Run(build()), Run(build())
    wanted = drive(whole, range(20))
    begun = drive(first, range(9))
    file = io.BytesIO()
    torch.save(first.executor.state_dict(), file)
    second.executor.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    assert begun + drive(second, range(9, 20)) == wanted


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: SwitchOn(2, "adv", share=1.0), ValueError, "share is 1.0"),
        (lambda: SwitchOn(2, "adv", bound=1.0), ValueError, "bound is 1.0"),
        (lambda: SwitchOn(2, "adv", rest=0), ValueError, "rest 0"),
        (lambda: WindDown(2, "adv", decay=1.0), ValueError, "decay is 1.0"),
        (lambda: WindDown(2, "adv", stall=0), ValueError, "stall 0"),
        (lambda: WindDown(2, "adv", metric="loss"), ValueError, "metric is 'loss'"),
        (lambda: Run(SwitchOn(2, "other", at=1)), KeyError, "'other' is not a term"),
        (lambda: Run(WindDown(2, "other", stall=1)), KeyError, "'other' is not a term"),
        (lambda: Run("switch_on").step(), ValueError, "weighting 'switch_on' needs a term and a time"),
        (lambda: Run("wind_down").step(), ValueError, "weighting 'wind_down' needs a term and a sign"),
        (lambda: Run(SwitchOn(2, "adv", at=0, share=0.5)).step(), ValueError, "needs gradients"),
        (lambda: SwitchOn(2, "adv", at=-1), ValueError, "at=-1, epoch=None: give 0 or more"),
        (lambda: Run(WindDown(2, "adv", opposed=1)).step(), ValueError, "needs gradients"),
    ],
)
def test_what_cannot_be(build: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()
