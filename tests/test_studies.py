"""Studies with a stubbed training run: resumption, refusal, failures, results on disk."""

from __future__ import annotations

import json
import os
import signal
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from adaptive_loss import records
from adaptive_loss.checkpoint import Checkpoints, gather
from adaptive_loss.errors import Stopped, UsageError
from adaptive_loss.trainer import (
    run_ablation_study,
    run_phase1_experiments,
    study,
    train_ablation,
    train_phase1,
    train_task,
)
from adaptive_loss.trainer.studies import Spec, finished, run_all
from adaptive_loss.utils.config import RunConfig, to_json

TERMS = ["ce", "kd"]
Fake = Callable[..., dict[str, Any]]


def fake_run(config: RunConfig, folder: Path, *, quiet: bool) -> dict[str, Any]:
    """A training run that takes no time; its accuracy depends on mode and seed, and is best for mixup near 0.1."""
    accuracy = 0.5 + 0.01 * len(config.mode) + 0.001 * (config.seed % 7)
    accuracy -= 0.01 * abs(config.weights.get("mixup", 1.0) - 0.1)
    row = dict.fromkeys(records.COLUMNS, 0) | {"mode": config.mode, "seed": config.seed, "status": "ok"}
    row |= {"epochs": config.epochs, "test_accuracy": accuracy, "test_loss": 1.0, "select_accuracy": accuracy}
    row |= {"train_seconds": 2.0}
    (folder / "config.json").write_text(json.dumps(to_json(config)))
    (folder / "metrics.csv").write_text("epoch\n1\n")
    (folder / "result.json").write_text(json.dumps(row))
    return row


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Stub the training loop under the commands; the (mode, seed) it was called with."""
    made: list[tuple[str, int]] = []

    def run(config: RunConfig, folder: Path, *, quiet: bool) -> dict[str, Any]:
        made.append((config.mode, config.seed))
        return fake_run(config, folder, quiet=quiet)

    loop = ModuleType("adaptive_loss.trainer.loop")
    loop.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "adaptive_loss.trainer.loop", loop)
    monkeypatch.setattr("adaptive_loss.trainer.loop", loop, raising=False)
    monkeypatch.setattr(study, "prepare", lambda settings: None)
    monkeypatch.setattr("adaptive_loss.trainer.single.prepare", lambda settings: None)
    monkeypatch.setattr(study, "task_terms", lambda settings: TERMS)
    return made


def specs(folder: Path, *seeds: int, **changes: Any) -> list[Spec]:
    config = replace(RunConfig(), **changes)
    return [Spec(config.mode, replace(config, seed=seed), folder / config.mode / f"seed_{seed}") for seed in seeds]


def ablate(folder: Path, *more: str, seeds: tuple[int, ...] = (1, 42)) -> int:
    argv = ["--output_dir", str(folder), "--jobs", "1", "--seeds", *map(str, seeds), *more]
    return run_ablation_study.main(argv)


# The engine ---------------------------------------------------------------------------------------------------


def test_rows_come_in_the_order_of_the_specs_under_their_labels(tmp_path: Path) -> None:
    asked = [replace(spec, label="adaptive") for spec in specs(tmp_path, 3, 1, 2)]
    rows = run_all(asked, 1, True, run=fake_run)
    assert [(row["mode"], row["seed"]) for row in rows] == [("adaptive", 3), ("adaptive", 1), ("adaptive", 2)]


def test_a_done_run_is_not_done_again_and_an_unfinished_one_is(tmp_path: Path) -> None:
    asked = specs(tmp_path, 1, 2, 3)
    first = run_all(asked, 1, True, run=fake_run)
    (asked[1].folder / "result.json").unlink()
    (asked[2].folder / "result.json").write_text('{"status": "ok"')  # torn
    again: list[int] = []

    def run(config: RunConfig, folder: Path, *, quiet: bool) -> dict[str, Any]:
        again.append(config.seed)
        return fake_run(config, folder, quiet=quiet)

    assert run_all(asked, 1, True, run=run) == first
    assert again == [2, 3]


def test_what_a_kill_after_the_result_has_left_is_removed(tmp_path: Path) -> None:
    asked = specs(tmp_path, 1)
    run_all(asked, 1, True, run=fake_run)
    before = sorted(os.listdir(asked[0].folder))
    (asked[0].folder / "running").touch()
    Checkpoints(asked[0].folder / "checkpoints").save(5, gather({}))
    run_all(asked, 1, True, run=fake_run)
    assert sorted(os.listdir(asked[0].folder)) == before


def test_a_request_to_stop_ends_the_study_and_is_no_row(tmp_path: Path) -> None:
    seen: list[int] = []

    def run(config: RunConfig, folder: Path, *, quiet: bool) -> dict[str, Any]:
        if config.seed == 2:
            raise Stopped("stopped by SIGTERM", 143)
        return fake_run(config, folder, quiet=quiet)

    with pytest.raises(Stopped, match="SIGTERM"):
        run_all(specs(tmp_path, 1, 2, 3), 1, True, run=run, on_row=lambda spec, row: seen.append(row["seed"]))
    assert seen == [1] and not (tmp_path / "baseline/seed_2/running").exists()


def test_a_worker_s_request_stops_all_workers(tmp_path: Path) -> None:
    def run(config: RunConfig, folder: Path, *, quiet: bool) -> dict[str, Any]:
        from adaptive_loss.errors import Stopped

        raise Stopped("stopped because a file is there", 143)

    seen: list[int] = []
    with pytest.raises(Stopped, match="stopped because a file is there") as caught:
        run_all(specs(tmp_path, 1, 2, 3, 4), 2, True, run=run, on_row=lambda spec, row: seen.append(row["seed"]))
    assert caught.value.code == 143 and seen == []
    assert [row["status"] for row in run_all(specs(tmp_path, 1, 2, 3, 4), 2, True, run=local_fake())] == ["ok"] * 4


@pytest.mark.parametrize("damage", [{"seed": 9}, {"test_accuracy": "0.5"}, {"steps": [1]}, {"status": "fine"}, None])
def test_a_result_of_another_run_or_not_whole_is_made_again(tmp_path: Path, damage: dict[str, Any] | None) -> None:
    (spec,) = specs(tmp_path, 1)
    (first,) = run_all([spec], 1, True, run=fake_run)
    stored = {"status": "ok", "seed": 1} if damage is None else first | damage
    (spec.folder / "result.json").write_text(json.dumps(stored))
    assert finished(spec) is None
    assert run_all([spec], 1, True, run=fake_run) == [first]


def test_a_stored_configuration_with_an_unknown_field_names_its_file(tmp_path: Path) -> None:
    (spec,) = specs(tmp_path, 1)
    run_all([spec], 1, True, run=fake_run)
    (spec.folder / "config.json").write_text('{"momentum": 0.9}')
    with pytest.raises(UsageError, match=r"seed_1/config\.json: unknown configuration field 'momentum'.*; move that"):
        run_all([spec], 1, True, run=fake_run)


def test_a_folder_of_another_configuration_is_refused_before_anything_starts(tmp_path: Path) -> None:
    run_all(specs(tmp_path, 2), 1, True, run=fake_run)
    with pytest.raises(UsageError, match="epochs 25 there, 30 here; choose another --output_dir"):
        run_all(specs(tmp_path, 1, 2, epochs=30), 1, True, run=fake_run)
    assert not (tmp_path / "baseline/seed_1").exists()


def test_an_output_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(UsageError, match="is a file"):
        run_all(specs(tmp_path / "out", 1), 1, True, run=fake_run)
    assert (tmp_path / "out").read_text() == "mine"


def test_a_run_with_damaged_configuration_is_not_overwritten(tmp_path: Path) -> None:
    (spec,) = specs(tmp_path, 1)
    run_all([spec], 1, True, run=fake_run)
    (spec.folder / "config.json").write_text("{")
    with pytest.raises(UsageError, match=r"config\.json is missing or damaged"):
        run_all([spec], 1, True, run=fake_run)


def test_a_failing_run_is_a_row_with_its_traceback_kept_and_is_tried_again(tmp_path: Path) -> None:
    def run(config: RunConfig, folder: Path, *, quiet: bool) -> dict[str, Any]:
        if config.seed == 2:
            raise RuntimeError("loss 'kd'\nis NaN")
        return fake_run(config, folder, quiet=quiet)

    asked = specs(tmp_path, 1, 2, 3)
    rows = run_all(asked, 1, True, run=run)
    assert [row["status"] for row in rows] == ["ok", "failed: loss 'kd' is NaN", "ok"]
    assert rows[1]["test_accuracy"] is None
    assert "Traceback" in (asked[1].folder / "error.txt").read_text()
    assert [row["status"] for row in run_all(asked, 1, True, run=fake_run)] == ["ok"] * 3
    assert not (asked[1].folder / "error.txt").exists()


def test_a_usage_error_in_a_run_stops_the_study(tmp_path: Path) -> None:
    def run(config: RunConfig, folder: Path, *, quiet: bool) -> dict[str, Any]:
        raise UsageError("--weights names the unknown term 'x'")

    with pytest.raises(UsageError, match="unknown term"):
        run_all(specs(tmp_path, 1, 2), 1, True, run=run)


def local_fake() -> Fake:
    """A stub that worker processes can have: defined in a function, it travels by value, without this module."""
    names = records.COLUMNS

    def run(config: RunConfig, folder: Path, *, quiet: bool) -> dict[str, Any]:
        import json
        import os
        import signal

        from adaptive_loss.utils.config import to_json

        if config.seed == 13:
            os.kill(os.getpid(), signal.SIGKILL)
        row = dict.fromkeys(names, 0) | {"mode": config.mode, "seed": config.seed, "status": "ok"}
        (folder / "config.json").write_text(json.dumps(to_json(config)))
        (folder / "metrics.csv").write_text("epoch\n1\n")
        (folder / "result.json").write_text(json.dumps(row))
        return row

    return run


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")
def test_a_dead_worker_is_a_failed_row_and_not_the_end(tmp_path: Path) -> None:
    asked = specs(tmp_path, 1, 13, 2, 3)
    seen: list[int] = []
    rows = run_all(asked, 2, True, run=local_fake(), on_row=lambda spec, row: seen.append(row["seed"]))
    assert [row["status"] == "ok" for row in rows] == [True, False, True, True]
    assert "worker process died" in rows[1]["status"]
    assert sorted(seen) == [1, 2, 3, 13]
    assert os.listdir(asked[1].folder) == ["error.txt"]


def test_workers_leave_ctrl_c_to_the_study(tmp_path: Path) -> None:
    names = records.COLUMNS

    def run(config: RunConfig, folder: Path, *, quiet: bool, **_: object) -> dict[str, Any]:
        import signal

        ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        return dict.fromkeys(names, 0) | {"seed": config.seed, "status": "ok", "steps": int(ignored)}

    rows = run_all(specs(tmp_path, 1, 2, 3), 2, True, run=run)
    assert [row["steps"] for row in rows] == [1, 1, 1]
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


# The commands -------------------------------------------------------------------------------------------------


def test_the_ablation_writes_the_contract(tmp_path: Path, calls: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert ablate(tmp_path) == 0
    lines = (tmp_path / "ablation_results.csv").read_text().splitlines()
    assert lines[0] == ",".join(records.COLUMNS)
    assert [line.split(",")[:2] for line in lines[1:]] == [
        [mode, seed] for mode in ("baseline", "monitor_only", "controller_only", "full") for seed in ("1", "42")
    ]
    document = json.loads((tmp_path / "ablation_results.json").read_text())
    assert set(document) == {"config", "rows", "summary", "comparisons", "provenance"}
    assert [(c["a"], c["b"]) for c in document["comparisons"]][:3] == [
        (mode, "baseline") for mode in ("monitor_only", "controller_only", "full")
    ]
    assert (tmp_path / "full/seed_42/result.json").exists()
    assert "fewer than five seeds" in capsys.readouterr().out


def test_the_results_say_which_data_they_are_of(
    tmp_path: Path, calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "prepare", lambda settings: {"name": "digits", "sha256": "b2da"})
    assert ablate(tmp_path, "--modes", "full") == 0
    document = json.loads((tmp_path / "ablation_results.json").read_text())
    assert document["provenance"]["data"] == {"name": "digits", "sha256": "b2da"}


def test_a_second_call_does_nothing_and_gives_the_same_bytes(tmp_path: Path, calls: list[Any]) -> None:
    ablate(tmp_path)
    before = (tmp_path / "ablation_results.csv").read_bytes()
    calls.clear()
    assert ablate(tmp_path) == 0
    assert calls == []
    assert (tmp_path / "ablation_results.csv").read_bytes() == before


def test_full_adaptive_is_full(tmp_path: Path, calls: list[Any]) -> None:
    assert ablate(tmp_path, "--modes", "baseline", "full_adaptive") == 0
    assert (tmp_path / "full/seed_1").is_dir()


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (["--seeds", "1", "2", "1"], "--seeds: 1 is given twice"),
        (["--seeds"], "--seeds is empty"),
        (["--modes", "full", "full_adaptive"], "--modes: full is given twice"),
        (["--modes", "full", "full-adaptive"], "--modes: full is given twice"),
        (["--modes", "nothing"], "--modes: unknown mode 'nothing'; choose from: adaptive, base_only,"),
        (["--dataset", "mnist"], "--dataset: unknown dataset 'mnist'"),
        (["--seeds", "1", "-3"], "--seeds: -3 is no seed"),
        (["--seeds", str(2**64)], f"--seeds: {2**64} is no seed"),
        (["--weights", "no=1"], "--weights names the unknown term 'no'; choose from: ce, kd"),
        (["--weights", "ce=0", "kd=0"], "--weights leaves every term at 0"),
        (["--device", "cuda"], "--device cuda: no CUDA device is available here"),
        (["--epochs", "0"], "--epochs is 0"),
        (["--jobs", "-1"], "--jobs is -1"),
        (["--trials", "0"], "--trials is 0"),
    ],
)
def test_bad_input_is_one_line_and_code_2(
    tmp_path: Path,
    calls: list[Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    more: list[str],
    line: str,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for extra in ([], ["--dry-run"]):  # what would run is not told of what cannot
        assert ablate(tmp_path / "out", *more, *extra) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert line in printed.err
        assert printed.err.startswith("error: ")
        assert printed.err.count("\n") == 1
    assert not calls
    assert not (tmp_path / "out").exists()


def test_cuda_is_missed_where_every_run_is_done_too(
    tmp_path: Path, calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert ablate(tmp_path) == 0
    assert ablate(tmp_path, "--device", "cuda") == 2


@pytest.mark.parametrize("output", ["", ".", "..", "/", "results", ".csv", "x.txt"])
def test_an_output_that_is_no_csv_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_phase1_experiments.main(["--output", output, "--dataset", "digits"]) == 2
    assert "is not the name of a .csv file; choose another --output" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_a_batch_larger_than_the_data_is_met_before_the_first_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--dataset", "digits", "--batch_size", "1001", "--seeds", "1", "--output", str(tmp_path / "x/p.csv")]
    assert run_phase1_experiments.main(argv) == 2
    assert "--batch-size 1001 is larger than the 1000 training images" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_hyphens_name_the_same_arm(tmp_path: Path, calls: list[Any]) -> None:
    assert ablate(tmp_path, "--modes", "base-only", "full-adaptive") == 0
    modes = [row.mode for row in records.read_results(tmp_path / "ablation_results.csv")]
    assert modes == ["base_only", "base_only", "full", "full"]
    assert train_ablation.main(["--ablation-mode", "full-adaptive", "--seed", "1", "--output-dir", str(tmp_path)]) == 0
    assert calls.count(("full", 1)) == 1


@pytest.mark.parametrize("single", [train_ablation.main, train_task.main])
def test_an_unknown_mode_of_one_run_names_its_flag(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], single: Callable[[list[str]], int]
) -> None:
    flag = "--ablation-mode" if single is train_ablation.main else "--mode"
    assert single([flag, "nothing", "--output-dir", str(tmp_path / "out")]) == 2
    assert f"{flag}: unknown mode 'nothing'; choose from: " in capsys.readouterr().err


def test_a_task_without_accuracy_is_judged_by_its_loss(
    tmp_path: Path, calls: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(config: RunConfig, folder: Path, *, quiet: bool) -> dict[str, Any]:
        row = fake_run(config, folder, quiet=quiet) | {"test_accuracy": None, "select_accuracy": None}
        row["test_loss"] = 24.0 + (config.mode == "full") + config.seed / 8
        (folder / "result.json").write_text(json.dumps(row))
        return row

    monkeypatch.setattr(sys.modules["adaptive_loss.trainer.loop"], "run", run)
    assert ablate(tmp_path, "--modes", "baseline", "full", seeds=(1, 2)) == 0
    printed = capsys.readouterr().out
    assert "test loss" in printed and "difference in nats" in printed and "24.19" in printed
    document = json.loads((tmp_path / "ablation_results.json").read_text())
    assert document["summary"]["baseline"]["mean"] == 24.1875
    assert [(item["metric"], item["difference"]) for item in document["comparisons"]] == [("test_loss", 1.0)]
    assert [row.test_loss for row in records.read_results(tmp_path / "ablation_results.csv")][:2] == [24.125, 24.25]


def test_results_of_another_configuration_are_refused(
    tmp_path: Path, calls: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    ablate(tmp_path)
    before = (tmp_path / "ablation_results.csv").read_bytes()
    for more, line in ((["--lr", "0.1"], "lr 0.001 there, 0.1 here"), (["--seeds", "1"], "also holds 42")):
        assert ablate(tmp_path, *more) == 2
        assert line in capsys.readouterr().err
    assert ablate(tmp_path, "--data-dir", "elsewhere") == 0
    assert (tmp_path / "ablation_results.csv").read_bytes() == before


def test_a_stranger_s_file_is_never_overwritten(
    tmp_path: Path, calls: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.csv").write_text("mine")
    assert run_phase1_experiments.main(["--output", str(tmp_path / "notes.csv"), "--jobs", "1"]) == 2
    assert (tmp_path / "notes.csv").read_text() == "mine"
    assert run_phase1_experiments.main(["--output", str(tmp_path / "notes.txt")]) == 2
    assert not calls


def test_more_seeds_extend_a_study(tmp_path: Path, calls: list[Any]) -> None:
    ablate(tmp_path, "--modes", "full", seeds=(1,))
    calls.clear()
    assert ablate(tmp_path, "--modes", "full", seeds=(1, 2)) == 0
    assert calls == [("full", 2)]


def test_phase_1_trains_fixed_weights_and_what_ships(tmp_path: Path, calls: list[Any]) -> None:
    output = tmp_path / "p1.csv"
    assert run_phase1_experiments.main(["--output", str(output), "--seeds", "1", "--jobs", "1"]) == 0
    assert [line.split(",")[0] for line in output.read_text().splitlines()] == ["mode", "baseline", "adaptive"]
    assert calls == [("baseline", 1), ("adaptive", 1)]
    assert (tmp_path / "p1/adaptive/seed_1/result.json").exists()


def test_a_killed_study_leaves_what_is_done(tmp_path: Path, calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def run(config: RunConfig, folder: Path, *, quiet: bool) -> dict[str, Any]:
        if config.seed == 42:
            raise KeyboardInterrupt
        return fake_run(config, folder, quiet=quiet)

    monkeypatch.setattr(sys.modules["adaptive_loss.trainer.loop"], "run", run)
    assert ablate(tmp_path, "--modes", "full") == 130
    assert len((tmp_path / "ablation_results.csv").read_text().splitlines()) == 2
    assert ablate(tmp_path, "--modes", "full", seeds=(1,)) == 2  # the file says that two seeds were asked for


def test_a_failed_run_is_a_row_and_code_1(
    tmp_path: Path, calls: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(config: RunConfig, folder: Path, *, quiet: bool) -> dict[str, Any]:
        raise RuntimeError("no luck")

    monkeypatch.setattr(sys.modules["adaptive_loss.trainer.loop"], "run", run)
    assert ablate(tmp_path, "--modes", "full", seeds=(1,)) == 1
    assert "1 of 1 runs failed, the first: full seed 1 failed: no luck" in capsys.readouterr().err
    assert (tmp_path / "ablation_results.csv").read_text().splitlines()[1].startswith("full,1,failed: no luck,25,")


def test_json_is_one_document_on_stdout(tmp_path: Path, calls: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert ablate(tmp_path, "--json") == 0
    printed = capsys.readouterr()
    assert len(json.loads(printed.out)["rows"]) == 8
    assert printed.err.count("\n") == 8


def test_dry_run_starts_nothing_and_measures_what_is_done(
    tmp_path: Path, calls: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert ablate(tmp_path / "out", "--dry-run", "--controls") == 0
    printed = capsys.readouterr().out
    assert "unknown until a run is done" in printed
    assert "tuned, trials     24 runs, 0 done" in printed
    assert not (tmp_path / "out").exists()
    ablate(tmp_path / "out", "--modes", "full")
    calls.clear()
    capsys.readouterr()
    assert ablate(tmp_path / "out", "--modes", "full", "baseline", "--dry_run", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["done"], plan["to_do"], plan["seconds_left"]) == (2, 2, 4.0)
    assert [run["done"] for run in plan["runs"]] == [True, True, False, False]
    assert calls == []


def test_tuned_searches_then_runs_the_study_s_seeds(tmp_path: Path, calls: list[Any]) -> None:
    assert ablate(tmp_path, "--modes", "baseline", "tuned", "--trials", "5") == 0
    search = json.loads((tmp_path / "tuned/trials.json").read_text())
    assert len(search["trials"]) == 5
    best = max(search["trials"], key=lambda trial: trial["select_accuracy"])
    assert search["chosen"] == best["trial"]
    config = json.loads((tmp_path / "tuned/seed_42/config.json").read_text())
    assert config["weights"] == best["weights"] and config["read_test"]
    trial = json.loads((tmp_path / "tuned/trials/trial_00/config.json").read_text())
    assert not trial["read_test"]
    assert calls.count(("baseline", 0)) == 5
    rows = json.loads((tmp_path / "ablation_results.json").read_text())["rows"]
    assert [row["mode"] for row in rows] == ["baseline", "baseline", "tuned", "tuned"]
    calls.clear()
    assert ablate(tmp_path, "--modes", "baseline", "tuned", "--trials", "5") == 0
    assert calls == []


@pytest.mark.parametrize("flag", ["--logdir", "--output_dir", "--output-dir"])
def test_one_run(tmp_path: Path, calls: list[Any], capsys: pytest.CaptureFixture[str], flag: str) -> None:
    argv = ["--adaptive", "--seed", "7", flag, str(tmp_path), "--json"]
    assert train_phase1.main(argv) == 0
    row = json.loads(capsys.readouterr().out)
    assert (row["mode"], row["seed"], row["status"]) == ("adaptive", 7, "ok")
    spec = Spec("adaptive", RunConfig(mode="adaptive", seed=7), tmp_path / "adaptive/seed_7")
    assert finished(spec) is not None
    assert train_phase1.main(argv) == 0
    assert calls == [("adaptive", 7)]


class Knot:
    """An object that refers to itself, as an optimizer under a schedule does."""

    def __init__(self) -> None:
        self.self = self


def test_a_worker_keeps_nothing_of_the_runs_it_has_done(tmp_path: Path) -> None:
    left: list[weakref.ref[Knot]] = []

    def run(config: RunConfig, folder: Path, *, quiet: bool) -> dict[str, Any]:
        left.append(weakref.ref(Knot()))
        return fake_run(config, folder, quiet=quiet)

    spec = Spec("baseline", RunConfig(), tmp_path / "baseline/seed_42")
    run_all([spec], jobs=1, quiet=True, run=run)
    assert left[0]() is None
