"""What the monitor is measured against: each rival trains the same runs, and recovery is of their gaps."""

from __future__ import annotations

import pytest
import torch

from adaptive_loss import LossExecutor
from adaptive_loss.guards import Guards
from adaptive_loss.losses import Terms
from adaptive_loss.meta.costs import log_finals
from adaptive_loss.meta.fleet import LOST
from adaptive_loss.meta.problems import Problem
from adaptive_loss.meta.rivals import RIVALS, overall, population, recovered
from adaptive_loss.meta.rollouts import rollout
from adaptive_loss.meta.ruled import RuledRun
from adaptive_loss.meta_controller import CLIMB

PROBLEM = Problem("multitask", 5, (5, 6, 7, 8))
STEPS = 60


@pytest.fixture(scope="module")
def finals() -> dict[str, list[float]]:
    return {name: rival(PROBLEM, STEPS) for name, rival in RIVALS.items()}


def test_a_rival_is_repeatable_and_finite(finals: dict[str, list[float]]) -> None:
    for name in ("tuned", "population_2"):
        assert RIVALS[name](PROBLEM, STEPS) == finals[name]
    assert all(len(values) == 4 and max(values) < LOST for values in finals.values())
    assert len({tuple(values) for values in finals.values()}) == len(RIVALS)


def test_a_population_of_one_is_the_start_weights_held(finals: dict[str, list[float]]) -> None:
    assert population(PROBLEM, STEPS, members=1) == pytest.approx(finals["held"], abs=1e-4)


def test_a_rule_on_a_fleet_is_what_the_executor_makes_of_it() -> None:
    start, values = {"a": 2.0, "b": 0.5}, torch.tensor([[1.0, 4.0], [0.5, 4.0], [0.25, 3.0]] * 10).double()
    for name in ("uncertainty", "dwa", "inverse_ema"):
        run = RuledRun(name, Terms(start, None), steps=30, rate=0.01)
        executor = LossExecutor(start, weighting=name, guards=Guards(spikes=False, rate_limit=None))
        parameter = torch.nn.Parameter(torch.zeros(()))
        optimizer = torch.optim.Adam([parameter, *executor.parameters()], lr=0.01)
        for step, row in enumerate(values):
            optimizer.zero_grad()
            executor({"a": row[0] + 0 * parameter, "b": row[1] + 0 * parameter}).backward()
            theirs = executor.step(optimizer).weights
            assert run.weights(row).tolist() == pytest.approx(list(theirs.values()), rel=1e-6), (name, step)
            if step % 2:
                executor.end_epoch()


def test_tuned_weights_beat_wrong_ones(finals: dict[str, list[float]]) -> None:
    assert sum(finals["tuned"]) < sum(finals["held"]) - 0.2


def test_the_arms_that_a_rollout_plays_are_of_the_same_runs() -> None:
    found = rollout(PROBLEM, ("keep",), steps=STEPS)
    assert found.finals[1].tolist() == pytest.approx(log_finals(CLIMB, PROBLEM, STEPS), abs=1e-3)


def test_recovery_is_of_the_gap_and_counts_lost_runs() -> None:
    finals = {"held": [2.0, 2.2, 1.9], "tuned": [1.0, 1.1, 1.0], "half": [1.5, 1.65, 1.45], "lost": [LOST, 1.0, 1.1]}
    found = recovered(finals)
    assert set(found) == {"half", "lost"}
    assert found["half"]["recovered"] == pytest.approx(0.5) and found["half"]["lost"] == 0
    assert found["lost"]["recovered"] < 0 and found["lost"]["lost"] == 1
    assert recovered({**finals, "tuned": finals["held"]})["half"]["recovered"] is None


def test_overall_is_the_middle_of_the_families_that_have_a_gap() -> None:
    def family(part: float) -> dict[str, list[float]]:
        return {"held": [1.0, 1.1, 1.2], "tuned": [0.0, 0.11, 0.2], "arm": [1.0 - part, 1.1 - part, 1.2 - part]}

    families = {str(part): family(part) for part in (-5.0, 0.8, 0.9, 1.0, 1.1)}
    flat = {"held": [1.0, 1.0, 1.1], "tuned": [1.0, 1.1, 1.0], "arm": [9.0, 9.0, 9.0]}
    found = overall({**families, "flat": flat}, "arm")
    assert found is not None and "flat" not in found["families"] and len(found["families"]) == 5
    assert 0.8 < found["recovered"] < 1.0
    low, high = found["recovered95"]
    assert low <= found["recovered"] <= high
    assert overall({"flat": flat}, "arm") is None
