"""A run's weights played back: what is applied is what was applied, step by step, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from adaptive_loss import LossExecutor
from adaptive_loss.guards import Guards
from adaptive_loss.history import WeightHistory
from adaptive_loss.trainer import compare
from adaptive_loss.weighting.replay import Replay

POINTS = [{"step": 1, "a": 1.0, "b": 0.5}, {"step": 4, "a": 1.0, "b": 3.0}]


def applied(executor: LossExecutor, steps: int) -> list[dict[str, float]]:
    """The weights of each of so many steps on losses that do not matter."""
    p, found = nn.Parameter(torch.tensor(1.0)), []
    optimizer = torch.optim.SGD([p], lr=0.0)
    for _ in range(steps):
        executor(dict.fromkeys(executor.terms.names, p**2)).backward()
        found.append(executor.step(optimizer).weights)
    return found


@pytest.mark.parametrize("start", [{"a": 1.0, "b": 1.0}, {"b": 7.0, "a": 0.3}])
def test_the_weights_are_the_schedule_s_whatever_the_start(start: dict[str, float]) -> None:
    found = applied(LossExecutor(start, base="a", weighting=Replay(2, POINTS)), 6)
    assert [step["b"] for step in found] == pytest.approx([0.5] * 3 + [3.0] * 3)
    assert [step["a"] for step in found] == pytest.approx([1.0] * 6)


def test_a_replay_of_a_replay_is_the_same() -> None:
    first = LossExecutor({"a": 1.0, "b": 2.0}, weighting=Replay(2, POINTS))
    wanted = applied(first, 6)
    again = LossExecutor({"a": 1.0, "b": 2.0}, weighting=Replay(2, first.export()["schedule"]))
    assert applied(again, 6) == wanted


def test_a_long_run_s_schedule_is_behind_by_less_than_its_stride() -> None:
    history = WeightHistory(("a", "b"))
    for step in range(1, 3001):
        history.add(step, torch.tensor([1.0, float(step)]))
    weighting, free = Replay(2, history.export()["schedule"]), Guards(share_cap=None)
    executor = LossExecutor({"a": 1.0, "b": 1.0}, weighting=weighting, guards=free)
    late = [step - weights["b"] for step, weights in enumerate(applied(executor, 200), 1)]
    assert min(late) >= 0 and max(late) == pytest.approx(history.stride - 1) and history.stride == 4


def test_a_term_that_is_off_stays_off() -> None:
    points = [{**point, "c": 0.0} for point in POINTS]
    executor = LossExecutor({"a": 1.0, "b": 1.0, "c": 0.0}, weighting=Replay(3, points))
    assert [step["c"] for step in applied(executor, 3)] == [0.0] * 3


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([{"a": 1.0, "b": 1.0}], "give 'step' and the same 2 terms"),
        ([*POINTS, {"step": 9, "a": 1.0, "c": 1.0}], "give 'step' and the same 2 terms"),
        ([*POINTS, {"step": 4, "a": 1.0, "b": 1.0}], "step 4 after 4"),
        ([{"step": 1, "a": 1.0, "b": -1.0}], "finite number of at least 0"),
        ([{"step": 1, "a": 1.0, "b": float("nan")}], "finite number of at least 0"),
    ],
)
def test_what_is_no_schedule_is_refused(points: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Replay(2, points)


def test_a_term_that_the_schedule_lacks_is_named() -> None:
    with pytest.raises(KeyError, match="its schedule has no 'kl', only a, b"):
        LossExecutor({"a": 1.0, "kl": 1.0}, weighting=Replay(2, POINTS))


def test_a_study_plays_a_run_back_step_by_step(tmp_path: Path) -> None:
    flags = ["vae", "--epochs", "5", "--weightings", "lookahead_only", "replay_mean", "replay_schedule"]
    more = ["--starts", "kl*10", "--seeds", "1", "--jobs", "1", "--output-dir", str(tmp_path)]
    assert compare.main([*flags, *more]) == 0

    def weights(arm: str) -> dict[str, Any]:
        return json.loads((tmp_path / arm / "kl_x10/seed_1/result.json").read_text())["weights"]

    adapted, mean, schedule = map(weights, ("lookahead_only", "replay_mean", "replay_schedule"))
    assert len({point["kl"] for point in adapted["schedule"]}) > 1  # it moved
    assert mean["final"] == pytest.approx(adapted["mean"])
    for played, point in zip(schedule["schedule"], adapted["schedule"], strict=True):
        assert played == pytest.approx(point)
