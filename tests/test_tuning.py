"""The search for fixed weights, with a stubbed training run: what it asks for, resumption, refusal, failures."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from adaptive_loss import records
from adaptive_loss.errors import RunError, UsageError
from adaptive_loss.locks import run_lock
from adaptive_loss.tasks import tasks
from adaptive_loss.tasks.base import Opponent, Task
from adaptive_loss.trainer import tune_task
from adaptive_loss.trainer.tuning import BATCH, Search, Space, read_tuned, search_for, space_of
from adaptive_loss.utils.config import RunConfig, Settings, to_json

pytest.importorskip("optuna")
Run = Callable[..., dict[str, Any]]
SPACE = Space({"ce": 1.0}, {"kd": 2.0, "kl": 0.01})


class Toy(Task):
    """What a search reads of a task."""

    terms = ("rec", "kl", "perceptual")
    base = "rec"
    opponents = (Opponent("critic", ("hinge", "r1")),)
    datasets = ("digits",)
    customary: ClassVar[dict[str, float]] = {"rec": 2.0, "kl": 0.5, "r1": 5.0, "perceptual": 0.0}
    metric = "loss"
    quick: ClassVar[dict[str, Any]] = {"epochs": 3}
    smoke: ClassVar[dict[str, Any]] = {"epochs": 1}


@pytest.fixture(autouse=True)
def no_collecting(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a real run leaves is collected after each; here that takes longer than the run."""
    monkeypatch.setattr("adaptive_loss.trainer.studies.gc.collect", lambda: 0)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tasks._objects, "toy", Toy)


def stub(done: list[str] | None = None, fail: Callable[[RunConfig], bool] = lambda config: False) -> Run:
    """A run that takes no time and is best, by a loss and an accuracy, for kd 0.1 and kl 0.001."""

    def run(config: RunConfig, folder: Path, *, quiet: bool) -> dict[str, Any]:
        if done is not None:
            done.append(folder.name)
        (folder / "config.json").write_text(json.dumps(to_json(config)))
        (folder / "metrics.csv").write_text("epoch\n1\n")
        if fail(config):
            raise RuntimeError("loss is NaN")
        wanted = {"kd": 0.1, "kl": 1e-3}
        far = sum(math.log10(config.weights.get(name, best) / best) ** 2 for name, best in wanted.items())
        row = dict.fromkeys(records.COLUMNS, 0) | {"seed": config.seed, "status": "ok", "test_accuracy": None}
        row |= {"select_accuracy": 1 / (1 + far), "select_loss": far, "train_seconds": 1.0}
        (folder / "result.json").write_text(json.dumps(row))
        return row

    return run


def search(folder: Path, trials: int = 12, metric: str = "loss", **changes: Any) -> Search:
    return Search(replace(RunConfig(), **changes), SPACE, metric, folder, trials)


def weights(folder: Path) -> list[dict[str, float]]:
    return [trial["weights"] for trial in json.loads((folder / "trials.json").read_text())["trials"]]


def test_the_space_lies_around_customary_weights_then_around_the_given_ones(toy: None) -> None:
    assert space_of(Toy, {"hinge": 3.0, "perceptual": 4.0}) == Space(  # type: ignore[arg-type]
        {"rec": 2.0, "hinge": 3.0}, {"kl": 0.5, "perceptual": 4.0, "r1": 5.0}
    )


def test_a_term_that_is_off_stays_off_and_something_must_be_left(toy: None) -> None:
    assert space_of(Toy, {"kl": 0.0, "r1": 0}).held == {"rec": 2.0, "kl": 0.0, "hinge": 1.0, "r1": 0.0}  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="no weight to search"):
        space_of(Toy, {"kl": 0, "perceptual": 0, "r1": 0})  # type: ignore[arg-type]


def test_trials_are_within_the_space_and_the_first_is_the_usual_weights(tmp_path: Path) -> None:
    search(tmp_path).run(1, run=stub())
    tried = weights(tmp_path)
    assert tried[0] == {"ce": 1.0, "kd": 2.0, "kl": 0.01}
    assert {trial["ce"] for trial in tried} == {1.0}
    assert all(2e-3 <= trial["kd"] <= 20 and 1e-5 <= trial["kl"] <= 0.1 for trial in tried)
    assert len({trial["kd"] for trial in tried}) == 12


@pytest.mark.parametrize("metric", ["loss", "accuracy"])
def test_the_best_trial_is_chosen_and_learned_from(tmp_path: Path, metric: str) -> None:
    found = search(tmp_path, 24, metric).run(1, run=stub())
    document = json.loads((tmp_path / "trials.json").read_text())
    best = min(document["trials"], key=lambda trial: trial["select_loss"])
    assert (document["chosen"], document["weights"]) == (best["trial"], best["weights"])
    assert found == best["weights"]
    losses = [trial["select_loss"] for trial in document["trials"]]
    assert sum(losses[12:]) < sum(losses[:12])  # the estimator comes nearer than chance


def test_every_trial_is_a_baseline_that_never_reads_the_test_split(tmp_path: Path) -> None:
    specs = search(tmp_path, mode="full", seed=7, weights={"kd": 3.0}).specs()
    assert {(spec.config.mode, spec.config.seed, spec.config.read_test) for spec in specs} == {("baseline", 0, False)}
    assert [spec.settled for spec in specs] == [True] * BATCH + [False] * 8


def test_a_search_that_was_cut_anywhere_finds_what_one_that_was_not_finds(tmp_path: Path) -> None:
    search(tmp_path / "whole").run(1, run=stub())
    for cut in (0, 3, 4, 6, 11):
        left = iter(range(cut))

        def cut_short(config: RunConfig, folder: Path, *, quiet: bool, left: Iterator[int] = left) -> dict[str, Any]:
            if next(left, None) is None:
                raise KeyboardInterrupt
            return stub()(config, folder, quiet=quiet)

        folder = tmp_path / str(cut)
        with pytest.raises(KeyboardInterrupt):
            search(folder).run(1, run=cut_short)
        assert search(folder).ended() == cut
        done: list[str] = []
        search(folder).run(1, run=stub(done))
        assert done == [f"trial_{number:02d}" for number in range(cut, 12)]
        assert (folder / "trials.json").read_bytes() == (tmp_path / "whole/trials.json").read_bytes()


def test_more_trials_go_on_with_a_search_as_if_they_had_been_asked_for_at_once(tmp_path: Path) -> None:
    for trials in (5, 7, 12):
        search(tmp_path / "grown", trials).run(1, run=stub())
    search(tmp_path / "whole", 12).run(1, run=stub())
    assert weights(tmp_path / "grown") == weights(tmp_path / "whole")


def test_the_number_of_processes_changes_nothing(tmp_path: Path) -> None:
    columns = records.COLUMNS

    def run(config: RunConfig, folder: Path, *, quiet: bool) -> dict[str, Any]:
        import json
        import time

        from adaptive_loss.utils.config import to_json

        time.sleep(config.weights["kd"] / 100)  # so that they end in another order than they began
        row = dict.fromkeys(columns, 0) | {"seed": config.seed, "status": "ok", "select_loss": config.weights["kd"]}
        (folder / "config.json").write_text(json.dumps(to_json(config)))
        (folder / "metrics.csv").write_text("epoch\n1\n")
        (folder / "result.json").write_text(json.dumps(row))
        return row

    search(tmp_path / "one", 9).run(1, run=run)
    search(tmp_path / "three", 9).run(3, run=run)
    assert (tmp_path / "one/trials.json").read_bytes() == (tmp_path / "three/trials.json").read_bytes()


def test_finished_runs_are_read_again_where_the_trials_file_is_lost(tmp_path: Path) -> None:
    search(tmp_path).run(1, run=stub())
    before = (tmp_path / "trials.json").read_bytes()
    (tmp_path / "trials.json").unlink()
    done: list[str] = []
    search(tmp_path).run(1, run=stub(done))
    assert (tmp_path / "trials.json").read_bytes() == before
    assert done == []


def test_a_failed_trial_is_kept_is_worst_and_is_not_tried_again(tmp_path: Path) -> None:
    unlucky = stub(fail=lambda config: config.weights["kd"] < 0.5)
    found = search(tmp_path).run(1, run=unlucky)
    document = json.loads((tmp_path / "trials.json").read_text())
    failed = [trial for trial in document["trials"] if trial["status"] != "ok"]
    assert failed and failed[0]["status"] == "failed: loss is NaN" and failed[0]["select_loss"] is None
    assert found["kd"] >= 0.5
    done: list[str] = []
    assert search(tmp_path).run(1, run=stub(done)) == found
    assert done == []
    assert search(tmp_path).ended() == 12
    values = [trial.value for trial in search(tmp_path).study(document["trials"]).trials]
    assert [value == math.inf for value in values] == [trial["status"] != "ok" for trial in document["trials"]]


def test_a_search_without_a_finished_trial_is_an_error_and_is_tried_again(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="none of the 2 tuning trials finished"):
        search(tmp_path, 2).run(1, run=stub(fail=lambda config: True))
    done: list[str] = []
    search(tmp_path, 2).run(1, run=stub(done))
    assert done == ["trial_00", "trial_01"]


def test_a_tie_goes_to_the_lower_select_loss_then_to_the_earlier(tmp_path: Path) -> None:
    losses = iter([0.9, 0.3, 0.5, 0.3])

    def run(config: RunConfig, folder: Path, *, quiet: bool) -> dict[str, Any]:
        return stub()(config, folder, quiet=quiet) | {"select_accuracy": 0.5, "select_loss": next(losses)}

    found = search(tmp_path, 4, "accuracy").run(1, run=run)
    assert found == weights(tmp_path)[1]


@pytest.mark.parametrize(
    ("other", "line"),
    [
        ({"epochs": 3}, "belongs to another search: epochs 25 there, 3 here"),
        ({"metric": "accuracy"}, "belongs to another search: its sampler, space or metric"),
        ({"trials": 3}, "holds 4 trials; give --trials 4 or more"),
    ],
)
def test_another_search_s_folder_is_refused(tmp_path: Path, other: dict[str, Any], line: str) -> None:
    search(tmp_path, 4).run(1, run=stub())
    before = (tmp_path / "trials.json").read_bytes()
    with pytest.raises(UsageError, match=line):
        search(tmp_path, **({"trials": 4} | other)).run(1, run=stub())
    assert (tmp_path / "trials.json").read_bytes() == before


@pytest.mark.parametrize(
    "change",
    [{"weights": {"ce": 1.0, "kd": 99.0, "kl": 0.01}}, {"select_loss": "0"}, {"status": None}, {"weights": {}}],
)
def test_trials_that_no_search_made_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    search(tmp_path, 4).run(1, run=stub())
    document = json.loads((tmp_path / "trials.json").read_text())
    document["trials"][2] |= change
    for text in (json.dumps(document), "{", "[]"):
        (tmp_path / "trials.json").write_text(text)
        with pytest.raises(UsageError, match=r"trials\.json is damaged; move it away"):
            search(tmp_path, 4).run(1, run=stub())


def test_one_process_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adaptive_loss.locks.PATIENCE_S", 0.0)
    with run_lock(tmp_path), pytest.raises(RunError, match="in use by another process"):
        search(tmp_path).run(1, run=stub())


# The command --------------------------------------------------------------------------------------------------


@pytest.fixture
def tune(toy: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    monkeypatch.setattr(tune_task, "prepare", lambda settings: None)
    monkeypatch.setattr("adaptive_loss.trainer.loop.run", stub())

    def call(*more: str) -> int:
        folder = ["--output-dir", str(tmp_path / "out"), "--jobs", "1"]
        return tune_task.main(["toy", "--trials", "5", *folder, *more])

    return call


def test_the_command_searches_shows_the_best_and_goes_on(
    tune: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tune("--dry-run") == 0
    assert "5 to do, 0 done" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    assert tune() == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[0].split() == ["trial", "select", "loss", "weights"]
    assert "the best of 5 trials" in printed
    assert tune("--trials", "6", "--json") == 0
    told = capsys.readouterr()
    document = json.loads(told.out)
    assert len(document["trials"]) == 6 and told.err.startswith("[6/6] trial_05 seed 0: ok")
    assert (document["config"]["dataset"], document["config"]["task"]) == ("digits", "toy")
    assert read_tuned(tmp_path / "out/trials.json", "toy") == document["weights"]


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (["--trials", "0"], "--trials is 0; give at least 1"),
        (["--weights", "no=1"], "--weights names the unknown term 'no'; choose from: rec, kl, perceptual, hinge, r1"),
        (["--weights", "kl=0", "perceptual=0", "r1=0"], "there is no weight to search"),
        (["--quick", "--smoke"], "--quick and --smoke exclude each other"),
        (["--epochs", "0"], "--epochs is 0"),
    ],
)
def test_bad_input_is_one_line_and_code_2(
    tune: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], line: str
) -> None:
    assert tune(*more) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("error: ") and printed.err.count("\n") == 1
    assert line in printed.err
    assert not (tmp_path / "out").exists()


def test_without_optuna_the_extra_is_named(
    tune: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    assert tune() == 1
    assert capsys.readouterr().err == "error: optuna is not installed; run: pip install 'adaptive-loss[study]'\n"


def test_tuned_weights_come_from_a_search_of_the_same_task(tmp_path: Path) -> None:
    search(tmp_path, 2).run(1, run=stub())
    file = tmp_path / "trials.json"
    assert read_tuned(file, "classify") == json.loads(file.read_text())["weights"]
    with pytest.raises(UsageError, match="is of task classify, not vae"):
        read_tuned(file, "vae")
    for text in ("{}", '{"weights": null, "config": {"task": "vae"}}', "no"):
        file.write_text(text)
        with pytest.raises(UsageError, match="holds no weights"):
            read_tuned(file, "vae")


def test_a_study_and_the_command_search_alike(tmp_path: Path) -> None:
    settings = Settings(task="vae", dataset="digits")
    mine, theirs = search_for(settings, tmp_path / "a"), search_for(settings, tmp_path / "b")
    assert mine.ask([]) == theirs.ask([])
    assert (mine.metric, mine.space) == ("loss", Space({"reconstruction": 1.0}, {"kl": 1.0}))
    assert search_for(Settings(), tmp_path).metric == "accuracy"
