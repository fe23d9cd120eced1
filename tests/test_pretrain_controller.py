"""Meta-training: its problems, its cost, its file."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from adaptive_loss import signals
from adaptive_loss.errors import UsageError
from adaptive_loss.meta import costs, problems
from adaptive_loss.meta import train as meta
from adaptive_loss.meta.problems import FAMILIES, sample
from adaptive_loss.meta_controller import CLIMB, ZERO, ControllerLaw

TINY = meta.MetaTrainFlags(seed=0, generations=2, population=2, problems=2, held_out=2, jobs=1)


@pytest.fixture(autouse=True)
def short_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of 6 steps."""
    monkeypatch.setattr(problems, "STEPS", 6)
    costs._first_final.cache_clear()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_problem_is_the_same_for_the_same_seed_and_another_for_another(family: str) -> None:
    before = torch.get_rng_state()
    finals = [problems.train(sample(family, seed), CLIMB, seed) for seed in (3, 3, 4)]
    assert torch.equal(before, torch.get_rng_state())
    assert finals[0] == finals[1] != finals[2] and all(math.isfinite(f) and f > 0 for f in finals)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_problem_has_a_base_of_1_and_wrong_auxiliaries_within_bounds(family: str) -> None:
    for seed in range(5):
        problem = sample(family, seed)
        base, *others = problem.weights.values()
        assert base == 1.0 and all(0.01 <= w <= 100 for w in others)
        losses = problem.terms(torch.arange(8))
        assert list(losses) == list(problem.weights)
        assert all(loss.requires_grad and torch.isfinite(loss) for loss in losses.values())


def test_the_rule_costs_nothing_against_itself_and_another_law_something() -> None:
    drawn = costs.draw_problems(3, 0)
    assert {family for family, _ in drawn} == set(FAMILIES)
    assert costs.cost(CLIMB, drawn) == 0.0
    assert costs.cost(ZERO, drawn) != 0.0


def test_a_lost_run_costs_at_most_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "train", lambda problem, law, seed: math.inf if law == ZERO else 1.0)
    assert costs.differences(ZERO, [("regression", 0)]) == [1.0]


def test_any_vector_is_a_safe_law() -> None:
    law = meta.bounded([50.0] * len(CLIMB.to_vector()))
    assert (law.early_step, law.late_step, law.calibration) == (1.4, 1.4, 1.0)
    law = meta.bounded([-50.0] * len(CLIMB.to_vector()))
    assert (law.early_step, law.late_step, law.calibration) == (0.0, 0.0, 0.0)


def test_same_seed_same_bytes_and_another_seed_another_file(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("one.json", "two.json", "other.json")]
    for file, seed in zip(files, (0, 0, 1), strict=True):
        assert meta.run(replace(TINY, seed=seed, output=file)) == 0
    one, two, other = (file.read_bytes() for file in files)
    assert one == two
    card, changed = json.loads(one), json.loads(other)
    assert card["found"] != changed["found"]
    assert card["signals_version"] == signals.VERSION and card["settings"]["seed"] == 0
    assert card["evidence"]["against_the_rule_on_fresh_problems"]["all"]["n"] == 2
    assert card["found"] != asdict(CLIMB)


@pytest.mark.parametrize(
    ("whole", "family", "ships"),
    [
        ([-0.2, -0.1], [-0.3, 0.04], True),
        ([-0.2, 0.0], [-0.3, -0.1], False),  # no gain for sure
        ([-0.2, -0.1], [-0.3, 0.06], False),  # a gain, but one family may pay for it
        (None, [-0.3, -0.1], False),
        ([-0.2, -0.1], None, False),
    ],
)
def test_a_law_ships_only_with_a_gain_and_without_harm(
    whole: list[float] | None, family: list[float] | None, ships: bool, tmp_path: Path
) -> None:
    found = replace(CLIMB, gain=0.5)
    flags = replace(TINY, output=tmp_path / "controller.json")
    meta.write(flags, found, [0.0], {"all": {"interval95": whole}, "toy": {"interval95": family}})
    assert ControllerLaw.load(flags.output) == (found if ships else CLIMB)
    written = json.loads(flags.output.read_text())
    assert ControllerLaw(**{n: tuple(v) if isinstance(v, list) else v for n, v in written["found"].items()}) == found
    assert written["families"] == ["toy"] and written["seeds"] == [0] and "--held-out 2" in written["made_by"]


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("generations", 1),
        ("population", 0),
        ("problems", -3),
        ("held_out", 1),
        ("sigma", 0.0),
        ("sigma", math.nan),
        ("seed", -1),
        ("seed", 1_000_000),
    ],
)
def test_bad_flags_are_usage_errors_that_name_the_flag(flag: str, value: float, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--" + flag.replace("_", "-")):
        meta.run(replace(TINY, output=tmp_path / "law.json", **{flag: value}))
    assert not (tmp_path / "law.json").exists()


def test_the_search_never_sees_the_problems_of_the_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def note(count: int, first_seed: int) -> list[tuple[str, int]]:
        seen.append(first_seed + count)
        return [("regression", 0)]

    monkeypatch.setattr(meta, "draw_problems", note)
    monkeypatch.setattr(meta, "compare_with_rule", lambda law, flags: {"all": {"interval95": None}})
    monkeypatch.setattr(meta, "write_policy", lambda *_: None)
    highest = meta.HELD_OUT_SEEDS // 4 - 1
    meta.run(replace(TINY, seed=highest))
    assert meta.HELD_OUT_SEEDS - 4 < max(seen) <= meta.HELD_OUT_SEEDS
    with pytest.raises(UsageError):
        meta.run(replace(TINY, seed=highest + 1))


def test_the_command_searches_in_worker_processes(tmp_path: Path) -> None:
    """Found by its first real run: what __main__ defines cannot be sent to a worker."""
    small = ["--generations", "2", "--population", "2", "--problems", "2", "--held-out", "2", "--jobs", "2"]
    command = [sys.executable, "-m", "adaptive_loss.meta.train", *small, "--output", str(tmp_path / "law.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "law.json").read_text())["found"] != asdict(CLIMB)
