"""A comparison with stubbed runs: its arms and starts, its results in the task's own metric, its pictures."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from adaptive_loss import records
from adaptive_loss.errors import UsageError
from adaptive_loss.ledger import Ledger
from adaptive_loss.rebuild import rebuild
from adaptive_loss.tasks import tasks
from adaptive_loss.tasks.base import Task
from adaptive_loss.trainer import compare, study
from adaptive_loss.trainer.arms import Arm, rule_arm, sourced, started
from adaptive_loss.trainer.simple_ablation_analysis import bca_interval, sign_flip_p
from adaptive_loss.utils.config import RunConfig, Settings, to_json

SEEDS = (1, 2, 3, 4, 5)
Compare = Callable[..., int]


class Toy(Task):
    """What a study reads of a task; it is judged by a metric that is no column of other studies."""

    terms = ("reconstruction", "kl")
    base = "reconstruction"
    opponents = ()
    datasets = ("digits",)
    customary: ClassVar[dict[str, float]] = {"kl": 0.5}
    metric = "own_kid"
    quick: ClassVar[dict[str, Any]] = {"epochs": 3}
    smoke: ClassVar[dict[str, Any]] = {"epochs": 1}


def kid(config: RunConfig) -> float:
    """Least at a KL weight of 0.1, and lower by 0.02 for the whole system; seeds differ."""
    far = abs(math.log10(config.weights.get("kl", 1.0) / 0.1))
    return 0.05 + 0.01 * far + 0.001 * config.seed**2 - 0.02 * (config.mode == "adaptive")


def stub(config: RunConfig, folder: Path, *, quiet: bool) -> dict[str, Any]:
    (folder / "config.json").write_text(json.dumps(to_json(config)))
    weight = config.weights.get("kl", 1.0)
    lines = ["epoch,step,loss_reconstruction,loss_kl,weight_reconstruction,weight_kl"]
    lines += [f"{epoch},{10 * epoch},{9 - epoch},{1 + epoch},1.0,{weight}" for epoch in (1, 2)]
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    row = dict.fromkeys(records.COLUMNS, 0) | {"mode": config.mode, "seed": config.seed, "status": "ok"}
    row |= {"test_accuracy": None, "select_accuracy": None, "test_loss": 50.0, "select_own_kid": kid(config)}
    row |= {"select_loss": 1.0, "train_seconds": 1.0}
    points = [{"step": step, "reconstruction": 1.0, "kl": weight * step} for step in (1, 2, 3)]
    row["weights"] = {"mean": {"reconstruction": 1.0, "kl": 2 * weight}, "schedule": points}
    if config.read_test:
        row |= {"test_own_kid": kid(config), "test_kl": 9 / weight, "test_reconstruction": 40 + weight}
    (folder / "result.json").write_text(json.dumps(row))
    return row


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Compare:
    """The command on a toy task whose runs take no time."""
    monkeypatch.setitem(tasks._objects, "toy", Toy)
    monkeypatch.setattr(study, "prepare", lambda settings: None)
    monkeypatch.setattr("adaptive_loss.trainer.loop.run", stub)
    monkeypatch.setattr("adaptive_loss.trainer.studies.gc.collect", lambda: 0)

    def call(*more: str, seeds: tuple[int, ...] = SEEDS) -> int:
        folder = ["--output-dir", str(tmp_path / "out"), "--jobs", "1", "--trials", "5"]
        return compare.main(["toy", *folder, "--seeds", *map(str, seeds), *more])

    return call


# Arms ---------------------------------------------------------------------------------------------------------


def test_an_arm_is_a_mode_or_a_rule_on_weights_that_nothing_else_moves() -> None:
    assert rule_arm("adaptive", "") == Arm("adaptive", "adaptive")
    assert rule_arm("lookahead-only", "") == Arm("lookahead_only", "lookahead_only")
    assert rule_arm("fixed", "") == Arm("fixed", weighting="fixed")
    assert rule_arm("tuned", "") == Arm("tuned", start="tuned")
    assert rule_arm("upgrad", "") == Arm("upgrad", weighting="torchjd:UPGrad")
    with pytest.raises(
        UsageError, match=r"--weightings: unknown weighting 'gradnom'; choose from: .*adaptive.*gradnorm"
    ):
        rule_arm("gradnom", "--weightings")


@pytest.mark.parametrize(
    ("start", "name", "given", "weights"),
    [
        ("given", "fixed", {}, {}),
        ("given", "fixed", {"kl": 3.0}, {"kl": 3.0}),
        ("customary", "fixed/customary", {"kl": 3.0}, {"kl": 0.5}),
        ("kl*10", "fixed/kl_x10", {}, {"kl": 5.0}),
        ("kl/10", "fixed/kl_x0.1", {"kl": 3.0}, {"kl": 0.3}),
        ("reconstruction*2", "fixed/reconstruction_x2", {}, {"kl": 0.5, "reconstruction": 2.0}),
    ],
)
def test_starts(toy: Compare, start: str, name: str, given: dict[str, float], weights: dict[str, float]) -> None:
    arm = started(Arm("fixed"), start)
    assert arm.name == name
    assert arm.weights(Settings(task="toy", weights=given)) == pytest.approx(weights)


@pytest.mark.parametrize("own", ["tuned", "customary"])
def test_arms_with_start_weights_of_their_own_have_one_start(own: str) -> None:
    assert started(rule_arm(own, ""), "kl*10") == rule_arm(own, "")


def test_every_arm_is_compared_with_the_first_of_its_start_and_with_tuned_weights() -> None:
    flags = compare.Flags(weightings=("fixed", "tuned", "adaptive"), starts=("given", "kl*10"))
    arms = compare.arms_of(flags, ["reconstruction", "kl"])
    assert [arm.name for arm in arms] == ["fixed", "tuned", "adaptive", "fixed/kl_x10", "adaptive/kl_x10"]
    assert compare.pairs_of(arms) == [
        ("adaptive", "fixed"),
        ("adaptive/kl_x10", "fixed/kl_x10"),
        *((name, "tuned") for name in ("fixed", "adaptive", "fixed/kl_x10", "adaptive/kl_x10")),
    ]


# The command --------------------------------------------------------------------------------------------------


def test_the_results_are_in_the_task_s_own_metric(
    toy: Compare, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert toy("--weightings", "fixed", "customary", "tuned", "adaptive") == 0
    out = tmp_path / "out"
    lines = (out / "compare.csv").read_text().splitlines()
    assert lines[0] == ",".join([*records.COLUMNS, "test_own_kid"])
    assert len(lines) == 1 + 4 * len(SEEDS)
    document = json.loads((out / "compare.json").read_text())
    assert set(document) == {"config", "rows", "summary", "comparisons", "provenance"}
    assert list(document["summary"]) == ["fixed", "customary", "tuned", "adaptive"]
    values = {(row["mode"], row["seed"]): row["test_own_kid"] for row in document["rows"]}
    differences = [values["adaptive", seed] - values["fixed", seed] for seed in SEEDS]
    first = document["comparisons"][0]
    assert (first["a"], first["b"], first["metric"]) == ("adaptive", "fixed", "test_own_kid")
    assert first["difference"] == pytest.approx(-0.02)
    assert (first["p"], first["interval95"]) == (sign_flip_p(differences), bca_interval(differences))
    search = json.loads((out / "tuned/trials.json").read_text())
    assert search["metric"] == "own_kid" and len(search["trials"]) == 5
    assert json.loads((out / "tuned/seed_5/config.json").read_text())["weights"] == search["weights"]
    printed = capsys.readouterr().out
    assert "test own kid, 95% interval" in printed and "difference in own kid, lower is better" in printed
    assert "fewer than five seeds" not in printed


def test_a_second_call_does_nothing_and_gives_the_same_bytes(
    toy: Compare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert toy("--weightings", "fixed", "tuned", seeds=(1, 2)) == 0
    files = {file: file.read_bytes() for file in (tmp_path / "out").glob("compare.*")}

    def never(*_: object, **__: object) -> dict[str, Any]:
        raise AssertionError("a run that is done was done again")

    monkeypatch.setattr("adaptive_loss.trainer.loop.run", never)
    assert toy("--weightings", "fixed", "tuned", seeds=(1, 2)) == 0
    assert {file: file.read_bytes() for file in files} == files


def test_the_results_are_rebuilt_from_the_ledger(toy: Compare, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert toy("--weightings", "fixed", "adaptive", seeds=(1, 2)) == 0
    files = {file: file.read_bytes() for file in out.glob("compare.*")}
    for file in files:
        file.unlink()
    assert rebuild(out) == [out / "compare.csv", out / "compare.json"]
    assert {file: file.read_bytes() for file in files} == files


def test_a_failed_run_is_a_row_without_the_metric(
    toy: Compare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(config: RunConfig, folder: Path, *, quiet: bool) -> dict[str, Any]:
        if config.mode == "adaptive":
            raise RuntimeError("the critic collapsed")
        return stub(config, folder, quiet=quiet)

    monkeypatch.setattr("adaptive_loss.trainer.loop.run", run)
    assert toy("--weightings", "fixed", "adaptive", seeds=(1, 2)) == 1
    printed = capsys.readouterr()
    assert "2 of 4 runs failed, the first: adaptive seed 1 failed: the critic collapsed" in printed.err
    assert "adaptive            0       2   none finished" in printed.out
    assert "Warning: fewer than five seeds prove nothing" in printed.out
    rows = json.loads((tmp_path / "out/compare.json").read_text())["rows"]
    assert [row["test_own_kid"] is None for row in rows] == [False, False, True, True]
    assert (tmp_path / "out/weights.png").exists()


def test_rules_are_run_on_start_weights_from_every_start(toy: Compare, tmp_path: Path) -> None:
    assert toy("--weightings", "gradnorm", "adaptive", "--starts", "given", "kl/10", seeds=(1,)) == 0
    config = json.loads((tmp_path / "out/gradnorm/kl_x0.1/seed_1/config.json").read_text())
    assert (config["mode"], config["weighting"], config["weights"]) == ("baseline", "gradnorm", {"kl": 0.05})
    assert json.loads((tmp_path / "out/adaptive/seed_1/config.json").read_text())["mode"] == "adaptive"


# Replays ------------------------------------------------------------------------------------------------------


def test_a_replay_takes_the_weights_of_the_run_of_its_seed_and_start(toy: Compare, tmp_path: Path) -> None:
    arms = ("--weightings", "replay_mean", "adaptive", "replay-schedule", "--starts", "given", "kl*10")
    assert toy(*arms, seeds=(1, 2)) == 2  # nothing adapts before the first
    assert toy("--weightings", "adaptive", "replay_mean", "replay-schedule", *arms[-3:], seeds=(1, 2)) == 0
    for place, weight in (("", 1.0), ("kl_x10/", 5.0)):
        mean, schedule = (
            json.loads((tmp_path / f"out/replay_{kind}/{place}seed_2/config.json").read_text())
            for kind in ("mean", "schedule")
        )
        assert (mean["mode"], mean["weighting"], mean["schedule"]) == ("baseline", "fixed", [])
        assert mean["weights"]["kl"] == 2 * weight
        assert (schedule["mode"], schedule["weighting"]) == ("baseline", "replay")
        assert schedule["weights"].get("kl", 1.0) == weight
        assert [point["kl"] for point in schedule["schedule"]] == [weight, 2 * weight, 3 * weight]


def test_a_replay_follows_the_adapting_arm_named_last_before_it() -> None:
    arms = [rule_arm(name, "") for name in ("lookahead_only", "fixed", "replay_mean", "full", "replay_schedule")]
    assert [arm.source for arm in sourced(arms, "")] == [None, None, "lookahead_only", None, "full"]


def test_replays_of_a_run_that_failed_are_failed_rows(
    toy: Compare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(config: RunConfig, folder: Path, *, quiet: bool) -> dict[str, Any]:
        if config.mode == "adaptive" and config.seed == 2:
            raise RuntimeError("it diverged")
        return stub(config, folder, quiet=quiet)

    def states() -> list[tuple[str, int, bool]]:
        rows = json.loads((tmp_path / "out/compare.json").read_text())["rows"]
        return [(row["mode"], row["seed"], row["status"] == "ok") for row in rows]

    monkeypatch.setattr("adaptive_loss.trainer.loop.run", run)
    assert toy("--weightings", "adaptive", "replay_mean", seeds=(1, 2)) == 1
    assert states() == [(arm, seed, seed == 1) for arm in ("adaptive", "replay_mean") for seed in (1, 2)]
    monkeypatch.setattr("adaptive_loss.trainer.loop.run", stub)
    assert toy("--weightings", "adaptive", "replay_mean", seeds=(1, 2)) == 0
    assert all(ok for _, _, ok in states())


def test_an_arm_that_cannot_run_is_met_before_the_search(
    toy: Compare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(config: RunConfig, folder: Path, *, quiet: bool) -> dict[str, Any]:
        if config.weighting == "gradnorm":
            raise UsageError("weighting 'gradnorm' needs gradients")
        return stub(config, folder, quiet=quiet)

    monkeypatch.setattr("adaptive_loss.trainer.loop.run", run)
    assert toy("--weightings", "tuned", "fixed", "gradnorm", seeds=(1,)) == 2
    assert capsys.readouterr().err.endswith("error: weighting 'gradnorm' needs gradients\n")
    assert not (tmp_path / "out/tuned").exists()
    assert toy("--weightings", "tuned", "fixed", seeds=(1,)) == 2  # the arm that could not run was asked for
    monkeypatch.setattr("adaptive_loss.trainer.loop.run", stub)
    assert toy("--weightings", "tuned", "fixed", "gradnorm", seeds=(1,)) == 0
    rows = json.loads((tmp_path / "out/compare.json").read_text())["rows"]
    assert [row["mode"] for row in rows] == ["tuned", "fixed", "gradnorm"]


def test_a_rule_that_lacks_its_target_is_refused_before_anything_runs(
    toy: Compare, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert toy("--weightings", "fixed", "geco", seeds=(1,)) == 2
    assert capsys.readouterr().err.endswith("'geco' needs targets: say what to hold, --targets term=value\n")
    assert list(tmp_path.rglob("result.json")) == []


def test_without_optuna_the_extra_is_named_before_the_first_run(
    toy: Compare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert toy("--weightings", "fixed", "tuned", seeds=(1,)) == 1
    assert capsys.readouterr().err == "error: optuna is not installed; run: pip install 'adaptive-loss[study]'\n"
    assert not (tmp_path / "out").exists()


def test_tuned_weights_of_a_search_that_is_done(toy: Compare, tmp_path: Path) -> None:
    file = tmp_path / "trials.json"
    file.write_text(json.dumps({"config": {"task": "toy"}, "weights": {"reconstruction": 1.0, "kl": 0.07}}))
    assert toy("--weightings", "fixed", "tuned", "--tuned", str(file), seeds=(1,)) == 0
    config = json.loads((tmp_path / "out/tuned/seed_1/config.json").read_text())
    assert config["weights"] == {"reconstruction": 1.0, "kl": 0.07}
    assert not (tmp_path / "out/tuned/trials").exists()


def test_dry_run_and_json(toy: Compare, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert toy("--dry-run") == 0
    assert "tuned, trials     5 runs, 0 done" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    assert toy("--weightings", "fixed", "--json", seeds=(1,)) == 0
    assert json.loads(capsys.readouterr().out)["config"]["metric"] == "test_own_kid"


def test_flags_come_from_a_file_too_but_no_code(
    toy: Compare, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "flags.json"
    file.write_text('{"weightings": ["fixed", "dwa"], "epochs": 2}')
    assert toy("--config", str(file), "--dry-run") == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[:2]] == ["fixed", "dwa"]
    file.write_text('{"weightings": ["os:system"]}')
    assert toy("--config", str(file), "--dry-run") == 2
    assert "is code outside the package, which a file may not name" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (["--weightings", "gradnom"], "--weightings: unknown weighting 'gradnom'; choose from:"),
        (["--weightings", "adaptive", "adaptive"], "--weightings: adaptive is given twice"),
        (["--weightings"], "--weightings is empty"),
        (["--starts"], "--starts is empty"),
        (["--starts", "kl+10"], "--starts: 'kl+10' is no start; give given, customary, TERM*10 or TERM/10"),
        (["--starts", "kl*0"], "--starts: 'kl*0' is no start"),
        (["--starts", "kd*10"], "--starts names the unknown term 'kd'; choose from: reconstruction, kl"),
        (["--weightings", "fixed", "geco"], "weighting 'geco' needs targets: say what to hold, --targets term=value"),
        (["--tuned", "no.json"], "--tuned no.json holds no weights"),
        (["--seeds", "1", "1"], "--seeds: 1 is given twice"),
        (["--weights", "kd=1"], "--weights names the unknown term 'kd'"),
        (["--trials", "0"], "--trials is 0"),
        (["--weightings", "fixed", "replay_mean"], "replay_mean replays a mode that adapts; name one before it"),
    ],
)
def test_bad_input_is_one_line_and_code_2(
    toy: Compare, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], line: str
) -> None:
    assert toy(*more) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("error: ") and printed.err.count("\n") == 1
    assert line in printed.err
    assert not (tmp_path / "out").exists()


def test_weights_of_a_search_that_no_arm_takes(
    toy: Compare, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "trials.json"
    file.write_text(json.dumps({"config": {"task": "toy"}, "weights": {"kl": 0.07}}))
    assert toy("--weightings", "fixed", "--tuned", str(file)) == 2
    assert "no arm takes it; add tuned to --weightings" in capsys.readouterr().err


# A stranger's ledger ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change", [{"file": "../elsewhere.csv"}, {"config": {"modes": ["a"], "seeds": [1], "metric": "status"}}]
)
def test_a_ledger_may_not_name_another_place_or_what_is_no_metric(tmp_path: Path, change: dict[str, Any]) -> None:
    from adaptive_loss.ledger import FILE_NAME, line_of, record_of

    heading = {"kind": "study", "at": 0.0, "inside": True, "pairs": [], "provenance": {}}
    config = {"modes": ["a"], "seeds": [1]}
    assert record_of(line_of({**heading, "config": config, "file": "compare.csv"})) is not None
    (tmp_path / FILE_NAME).write_bytes(line_of({**heading, "config": config, **change}))
    with Ledger(tmp_path) as ledger:
        assert ledger.records == []


def test_a_metric_that_is_no_number_is_no_row() -> None:
    from adaptive_loss.ledger import line_of, record_of

    row = {"mode": "full", "seed": 1, "status": "ok", "test_own_kid": 0.1}
    assert record_of(line_of({"kind": "row", "at": 0.0, "row": row})) is not None
    assert record_of(line_of({"kind": "row", "at": 0.0, "row": row | {"test_own_kid": "0.1"}})) is None


# Pictures -----------------------------------------------------------------------------------------------------


def test_the_pictures(toy: Compare, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = pytest.importorskip("matplotlib.image")
    assert toy("--weightings", "fixed", "customary", "adaptive", seeds=(1, 2)) == 0
    out = tmp_path / "out"
    assert sorted(file.name for file in out.glob("*.png")) == ["rate_distortion.png", "shares.png", "weights.png"]
    for arm in ("fixed", "adaptive"):
        pictures = out / arm / "seed_1/pictures"
        pictures.mkdir()
        for step in (5, 10):
            image.imsave(pictures / f"samples_{step:06d}.png", np.full((8, 8, 3), step * 20, np.uint8))
    capsys.readouterr()
    assert toy("--weightings", "fixed", "customary", "adaptive", seeds=(1, 2)) == 0
    assert "compare.json, weights.png, shares.png, pictures_samples.png, rate_distortion.png" in capsys.readouterr().out
    assert compare._last_pictures(out / "fixed/seed_1")["samples"].name == "samples_000010.png"
    assert len(list(out.glob("pictures_*.png"))) == 1


def test_the_line_goes_through_the_arms_whose_weights_stay_fixed() -> None:
    def fixed(name: str, weighting: str = "fixed") -> bool:
        arm = rule_arm(name, "")
        study_ = study.Study(Settings(weighting=weighting), (arm,), (1,), Path("c.csv"), Path())
        return compare._is_fixed(study_, arm)

    assert [fixed(name) for name in ("fixed", "customary", "tuned", "adaptive", "gradnorm")] == [True] * 3 + [False] * 2
    assert fixed("fixed", "geco") and not fixed("customary", "geco")
