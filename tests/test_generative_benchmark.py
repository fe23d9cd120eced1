"""The benchmarks that train arms × seeds: their arms are runs that can be, and their tables say what the rows hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from adaptive_loss import LossExecutor, LossMonitor
from adaptive_loss.policy_files import POLICIES, read_policy
from adaptive_loss.rl.networks import equivariant_values
from adaptive_loss.rl.nudges import N_GLOBAL, N_TERM
from adaptive_loss.utils.config import validate
from benchmarks import arms as study
from benchmarks import gate, generative, score_errors, set_point, switch_on


@pytest.mark.parametrize(
    ("benchmark", "arms"), [(generative, 7 + 2 * 5), (score_errors, 13), (switch_on, 3), (gate, 18)]
)
def test_arms_are_pairs_by_seed_in_folders_of_their_own(benchmark: Any, arms: int) -> None:
    flags = benchmark.Flags(seeds=(1, 2))
    todo = study.specs(flags, benchmark.arms(flags))
    assert len(todo) == 2 * arms == len({spec.folder for spec in todo})
    for spec in todo:
        validate(spec.config)


def test_the_adaptive_arms_of_the_vae_start_from_every_weight_with_every_objective() -> None:
    found = generative.arms(generative.Flags()).values()
    adaptive = {(c.objective, c.weights["kl"]) for c in found if c.mode != "baseline"}
    assert adaptive == {(objective, kl) for objective in ("elbo", "sample_quality") for kl in generative.STARTS}


def rows(values: dict[str, list[float]]) -> list[dict[str, Any]]:
    return [
        {"arm": arm, "seed": seed, "status": "ok", "error": value}
        for arm, seeds in values.items()
        for seed, value in enumerate(seeds)
    ]


def test_the_table_has_means_of_what_finished_and_counts_the_rest() -> None:
    failed = {"arm": "a", "seed": 9, "status": "failed: it diverged", "error": None}
    lines = study.table([*rows({"a": [1.0, 3.0], "b": [4.0]}), failed], ["error"]).splitlines()
    assert [line.split() for line in lines[1:]] == [["a", "2", "1", "2"], ["b", "1", "0", "4"]]


def test_an_arm_is_measured_against_the_best_fixed_one() -> None:
    found = rows({"low": [1.0, 2.0, 3.0], "high": [9.0, 9.0, 9.0], "ours": [1.1, 2.1, 3.4]})
    (item,) = study.against_best(found, ["error"], ["low", "high"])
    assert (item["arm"], item["best"]) == ("ours", "low")
    assert item["ratio"] == pytest.approx(6.6 / 6.0) and item["interval95"][0] < 1.1 < item["interval95"][1]


def test_a_rival_with_a_failed_run_is_not_the_best() -> None:
    failed = {"arm": "low", "seed": 3, "status": "failed: it diverged", "error": None}
    found = [*rows({"low": [1.0, 2.0, 3.0], "high": [9.0, 9.1, 9.2], "ours": [9.0, 9.0, 9.1]}), failed]
    assert study.against_best(found, ["error"], ["low", "high"])[0]["best"] == "high"


def test_a_tilt_leaves_the_middle_and_spans_two_decades() -> None:
    weights = score_errors.tilted({f"bucket_{k}": 2.0 for k in range(9)})
    assert weights["bucket_4"] == pytest.approx(2.0)
    assert (weights["bucket_0"], weights["bucket_8"]) == pytest.approx((0.2, 20.0))


@pytest.mark.parametrize(
    ("hits", "n", "interval"), [(0, 10, (0.0, 0.3085)), (10, 10, (0.6915, 1.0)), (1, 10, (0.0025, 0.4450))]
)
def test_the_exact_interval_of_a_share(hits: int, n: int, interval: tuple[float, float]) -> None:
    """Against printed tables of Clopper and Pearson's interval."""
    assert switch_on.share_interval(hits, n) == pytest.approx(interval, abs=1e-4)


def test_a_jump_above_the_bound_and_a_failed_run_are_collapses() -> None:
    found = [{"arm": "a", "status": "ok", "jump": jump} for jump in (0.1, 0.5, 0.6)]
    found.append({"arm": "a", "status": "failed: it diverged", "jump": None})
    assert switch_on.counts(found).startswith("a: 2 of 4 collapsed or failed")


@pytest.mark.parametrize("change", list(set_point.CHANGES))
def test_a_target_is_the_same_demand_in_every_unit(change: str) -> None:
    """8 nats an image, or 1 in squared units of images from 0 to 1, whatever the executor is told of."""
    for held, asked in set_point.ASKED.items():
        case = set_point.Case(held, "set_point", change)  # pyright: ignore[reportArgumentType]
        own = asked * (case.how.scale**2 if held == "distortion" else 1.0) / (case.size if case.how.mean else 1)
        assert case.relative(own) == pytest.approx(1.0)
        assert case.executor(10, 1).terms.targets == {held: case.target}


def test_one_case_runs_and_is_reported() -> None:
    row = set_point.run(set_point.Case("rate", "set_point", "mean, declared"), seed=1, epochs=1)
    assert row["asked"] == 8.0 and row["reached"] > 0 and row["skipped"] == 0
    assert f"{row['reached']:.3f}" in set_point.table([row])


def test_a_turned_monitor_wants_the_opposite() -> None:
    _, networks = read_policy(POLICIES, "monitor")
    observation = torch.rand(N_GLOBAL + 3 * N_TERM, generator=torch.Generator().manual_seed(0)).numpy()
    right, wrong = (
        equivariant_values({name: part.numpy() for name, part in one.items()}, observation)
        for one in (networks, gate.turned(networks))
    )
    assert (abs(right) > 1e-6).any() and wrong == pytest.approx(-right)


def test_a_gate_that_is_shown_nothing_stays_open() -> None:
    held_out = [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 2.0, 2.0, 2.0]
    shares = []
    for kind in (LossMonitor, gate.Ungated):
        monitor = kind(rho=1.0)
        executor = LossExecutor({"a": 1.0, "b": 1.0}, base="a", modulators=[monitor], total_steps=100)
        monitor.nudges.residual[1] = 1.0
        for loss in held_out:
            executor.end_epoch(select_loss=loss)
        shares.append(monitor.gate.share)
    assert shares == [0.5, 1.0]
