"""Meta-training of the controller's law: its cost, its search, its policy."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from adaptive_loss import signals
from adaptive_loss.errors import UsageError
from adaptive_loss.meta import costs, pretrain, problems
from adaptive_loss.meta import pretrain_controller as meta
from adaptive_loss.meta.problems import Problem
from adaptive_loss.meta_controller import CLIMB, ZERO, ControllerLaw, MetaController

TINY = meta.Flags(generations=2, population=2, runs=1, held_out=1, steps=20, families=("multitask", "pinn"), jobs=1)


def test_the_first_law_costs_nothing_against_itself_and_another_one_something() -> None:
    drawn = problems.draw_problems(["multitask", "pinn"], 2, 0)
    assert costs.cost(CLIMB, drawn, steps=20) == 0.0
    assert costs.cost(ZERO, drawn, steps=20) != 0.0


def test_held_weights_are_the_law_that_never_moves() -> None:
    problem = Problem("multitask", 1, (1, 2))
    assert costs.log_finals(None, problem, 20) == pytest.approx(costs.log_finals(ZERO, problem, 20), abs=1e-4)


def test_a_lost_run_costs_at_most_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "log_finals", lambda law, problem, steps: [30.0] if law == ZERO else [0.0])
    monkeypatch.setattr(costs, "_first_finals", lambda problem, steps: [0.0])
    assert costs.differences(ZERO, Problem("vae", 0, (0,)), 20) == [1.0]


def test_problems_of_training_validation_and_judging_never_meet() -> None:
    drawn = problems.draw_problems(["vae", "gan"], 3, 6, draws=2)
    assert drawn == [Problem(n, s, tuple(range(s, s + 3))) for s in (6, 9) for n in ("vae", "gan")]
    assert problems.VALIDATION_SEEDS < problems.HELD_OUT_SEEDS


def test_families_can_be_chosen_and_left_out() -> None:
    assert "turning" not in problems.chosen_families((), ()) and len(problems.chosen_families((), ())) == 7
    assert problems.chosen_families(("vae", "turning"), ("vae",)) == ["turning"]
    with pytest.raises(UsageError, match=r"--without: unknown family 'vea'.*vae"):
        problems.chosen_families((), ("vea",))
    assert problems.chosen_families(("vq-adversarial", "vq_adversarial"), ()) == ["vq_adversarial"]
    assert "vq_adversarial" not in problems.chosen_families((), ("vq-adversarial",))
    with pytest.raises(UsageError, match="turning is kept apart"):
        problems.families_to_train_on(("turning",), ())
    with pytest.raises(UsageError, match="leaves no family"):
        problems.chosen_families(("vae",), ("vae",))


def test_any_vector_is_a_safe_law() -> None:
    law = meta.bounded([50.0] * len(CLIMB.to_vector()))
    assert (law.early_step, law.late_step, law.calibration) == (1.4, 1.4, 1.0)
    law = meta.bounded([-50.0] * len(CLIMB.to_vector()))
    assert (law.early_step, law.late_step, law.calibration) == (0.0, 0.0, 0.0)


def test_same_seed_same_bytes_and_another_seed_another_policy(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        assert meta.run(replace(TINY, output_dir=folder)) == 0
    for name in ("controller.json", "controller.safetensors", "search.json"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
    card = json.loads((folders[0] / "controller.json").read_text())
    other, _ = meta.search(replace(TINY, seed=1, output_dir=tmp_path / "other"), TINY.families)
    assert card["found"] not in (json.loads(json.dumps(asdict(law))) for law in (other, CLIMB))
    assert card["signals_version"] == signals.VERSION and card["settings"]["seed"] == 0
    assert card["families"] == ["multitask", "pinn"]
    assert card["evidence"]["log_ratio_to_the_first_law_on_fresh_runs"]["all"]["n"] == 8
    assert MetaController.from_policy(folders[0]).law.climbs


def test_a_search_that_was_stopped_goes_on_to_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, stopped = (replace(TINY, output_dir=tmp_path / name) for name in ("whole", "stopped"))
    law, curve = meta.search(whole, TINY.families)
    asked = []

    def stop(law: ControllerLaw, drawn: list[Problem], steps: int) -> float:
        asked.append(law)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return costs.one_thread_cost(law, drawn, steps)

    monkeypatch.setattr(meta, "one_thread_cost", stop)
    with pytest.raises(KeyboardInterrupt):
        meta.search(stopped, TINY.families)
    monkeypatch.setattr(meta, "one_thread_cost", costs.one_thread_cost)
    assert meta.search(stopped, TINY.families) == (law, curve)
    with pytest.raises(UsageError, match="other settings"):
        meta.search(replace(stopped, seed=1), TINY.families)
    (stopped.output_dir / "search.json").write_text("{}")
    with pytest.raises(UsageError, match="move it away"):
        meta.search(stopped, TINY.families)


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
    found, evidence = replace(CLIMB, gain=0.5), {"all": {"interval95": whole}, "toy": {"interval95": family}}
    meta.write(replace(TINY, output_dir=tmp_path), found, [0.0], evidence)
    assert ControllerLaw.load(tmp_path / "controller.json") == (found if ships else CLIMB)
    assert json.loads((tmp_path / "controller.json").read_text())["found"] == json.loads(json.dumps(asdict(found)))


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("generations", 1),
        ("population", 0),
        ("runs", -3),
        ("held_out", 0),
        ("steps", 19),
        ("sigma", 0.0),
        ("sigma", math.nan),
        ("seed", -1),
        ("seed", 1_000_000),
        ("jobs", -1),
    ],
)
def test_bad_flags_are_usage_errors_that_name_the_flag(flag: str, value: float, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--" + flag.replace("_", "-")):
        meta.run(replace(TINY, output_dir=tmp_path / "policy", **{flag: value}))
    assert not (tmp_path / "policy").exists()


def test_the_search_never_sees_the_runs_of_the_comparison(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[int] = []

    def note(law: ControllerLaw, drawn: list[Problem], steps: int) -> float:
        seen.extend(seed for problem in drawn for seed in problem.seeds)
        return float(len(seen))

    monkeypatch.setattr(meta, "one_thread_cost", note)
    monkeypatch.setattr(meta, "compare_with_first", lambda law, flags, names: {"all": {"interval95": None}})
    highest = problems.VALIDATION_SEEDS // 2 - 1
    meta.run(replace(TINY, seed=highest, output_dir=tmp_path))
    assert problems.VALIDATION_SEEDS - 4 < max(seen) < problems.VALIDATION_SEEDS


def test_the_command_writes_a_policy_from_worker_processes(tmp_path: Path) -> None:
    """Found by its first real run: what __main__ defines cannot be sent to a worker."""
    small = ["--generations", "2", "--population", "2", "--runs", "1", "--held-out", "1", "--steps", "20"]
    small += ["--families", "multitask", "--jobs", "2", "--output-dir", str(tmp_path)]
    assert pretrain.main(["controller", *small]) == 0
    card = json.loads((tmp_path / "controller.json").read_text())
    assert card["found"] != asdict(CLIMB)
    assert card["made_by"].startswith("adaptive-loss pretrain controller --seed 0 --steps 20 --families multitask")


def test_pretrain_names_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert pretrain.main(["critic"]) == 2
    assert capsys.readouterr().err.strip() == (
        "error: pretrain: 'critic' is no policy; choose from: monitor, controller"
    )
    assert pretrain.main(["--help"]) == 0 and "monitor|controller" in capsys.readouterr().out
