"""One run end to end on the digits: its folder, its row, its determinism, and what it never looks at."""

from __future__ import annotations

import csv
import json
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adaptive_loss import records
from adaptive_loss.checkpoint import Checkpoints, load_file
from adaptive_loss.data import digits as digits_module
from adaptive_loss.data.base import Dataset, Split
from adaptive_loss.errors import Stopped, UsageError
from adaptive_loss.events import Event
from adaptive_loss.modes import modes
from adaptive_loss.trainer import loop
from adaptive_loss.trainer.stopping import StopRequest
from adaptive_loss.trainer.studies import Spec, check_folders, run_all
from adaptive_loss.trainer.training import prepare, shares
from adaptive_loss.utils.config import RunConfig
from tests.reliability.bits import differences

FILES = {"config.json", "metrics.csv", "events.jsonl", "result.json", "checkpoint.pt", "tb"}
CONFIG = RunConfig(dataset="digits", epochs=2, batch_size=100, threads=1, precision="fp32", device="cpu")
MODES = [
    "baseline",
    "base_only",
    "base_only_all",
    "lookahead_only",
    "controller_only",
    "monitor_only",
    "full",
    "random_monitor",
]


@pytest.fixture(scope="module", autouse=True)
def read_once() -> Iterator[None]:
    """Read the digits once for all runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_load", lambda config: data())
        yield


@cache
def data() -> Dataset:
    return digits_module.load(seed=0)


Whole = Callable[[str], tuple[Path, dict[str, Any]]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, read_once: None) -> Whole:
    """Folder and result of a task's run in the mode `full`, to be looked at only: it is the same for all tests."""

    @cache
    def run(task: str) -> tuple[Path, dict[str, Any]]:
        folder = tmp_path_factory.mktemp(task)
        return folder, loop.run(replace(CONFIG, task=task, mode="full"), folder, quiet=True)

    return run


def row_of(result: dict[str, Any]) -> dict[str, Any]:
    return {name: result[name] for name in records.COLUMNS if name != "train_seconds"}


def test_folder_and_row(whole: Whole) -> None:
    folder, result = whole("classify")
    assert {file.name for file in folder.iterdir()} == FILES
    assert list(result)[: len(records.COLUMNS)] == list(records.COLUMNS)
    assert result["mode"] == "full" and result["seed"] == 42 and result["status"] == "ok"
    assert result["epochs"] == 2 and result["steps"] == 20
    assert 0 <= result["test_accuracy"] <= 1 and result["test_loss"] > 0
    saved = json.loads((folder / "result.json").read_text())
    assert row_of(saved) == row_of(result) and saved["provenance"]
    assert saved["data"]["sha256"] == digits_module.SHA256 and saved["device"] == "cpu"
    rows = list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))
    assert [row["epoch"] for row in rows] == ["1", "2"] and rows[1]["step"] == "20"
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert len(events) == result["interventions"] > 0
    assert {"controller"} <= {event["kind"] for event in events}
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert checkpoint["config"]["mode"] == "full" and checkpoint["executor"]
    assert list((folder / "tb").iterdir())


def test_tensorboard_shows_losses_weights_shares_actions_and_skips(whole: Whole) -> None:
    tags = set(curves(whole("classify")[0]))
    for group in ("loss", "weight", "share"):
        assert {f"{group}/cross_entropy", f"{group}/confidence"} <= tags
    assert {"interventions", "skipped_steps", "select/accuracy"} <= tags


def test_what_an_unfinished_run_left_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("epoch\n99\n")
    (tmp_path / "events.jsonl").write_text("{}\n")
    loop.run(CONFIG, tmp_path, quiet=True)
    assert [row["epoch"] for row in csv.DictReader((tmp_path / "metrics.csv").open())] == ["1", "2"]
    assert "{}" not in (tmp_path / "events.jsonl").read_text().splitlines()


def stopped(config: RunConfig, folder: Path, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run until a request to stop comes between step ``step`` and the next."""
    with monkeypatch.context() as patch:
        asked = iter([None] * (step - 1) + [Stopped("stopped by a test", 143)])
        patch.setattr(StopRequest, "asked", lambda self: next(asked))
        with pytest.raises(Stopped):
            loop.run(config, folder, quiet=True)


def carried(folder: Path) -> dict[str, Any]:
    """All that the run's last state holds, but for its seconds."""
    state = load_file(folder / "checkpoint.pt")
    del state["counters"]["seconds"]
    return state


@pytest.mark.parametrize("task", ["classify", "vae"])
@pytest.mark.parametrize("step", [3, 10, 17])  # in an epoch, at its edge, and in the next
def test_a_run_that_was_stopped_goes_on_to_the_last_bit(
    task: str, step: int, whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, result = whole(task)
    config = replace(CONFIG, task=task, mode="full")
    stopped(config, tmp_path, step, monkeypatch)
    assert not (tmp_path / "result.json").exists()
    torch.manual_seed(99)  # another process
    assert row_of(loop.run(config, tmp_path, quiet=True)) == row_of(result)
    assert differences(carried(tmp_path), carried(folder)) == []
    pictures = {"pictures"} if task == "vae" else set()
    assert {file.name for file in tmp_path.iterdir()} == FILES | pictures
    for name in ("metrics.csv", "events.jsonl", "tb/scalars.jsonl"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    assert curves(tmp_path) == curves(folder)


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a run."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    files = accumulator.EventAccumulator(str(folder / "tb"))
    files.Reload()
    return {tag: [(event.step, event.value) for event in files.Scalars(tag)] for tag in files.Tags()["scalars"]}


def test_saving_changes_nothing_and_seconds_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    often, never = replace(CONFIG, save_every="1"), replace(CONFIG, save_every="1000")
    loop.run(often, tmp_path / "often", quiet=True)
    loop.run(never, tmp_path / "never", quiet=True)
    places = [tmp_path / "often", tmp_path / "never"]
    one, two = ({name: part for name, part in carried(place).items() if name != "config"} for place in places)
    assert differences(one, two) == []
    stopped(CONFIG, tmp_path / "cut", 5, monkeypatch)
    before = Checkpoints(tmp_path / "cut/checkpoints").load()
    result = loop.run(CONFIG, tmp_path / "cut", quiet=True)
    assert before is not None and result["train_seconds"] > before["counters"]["seconds"][0] > 0  # type: ignore[operator]


def test_no_resume_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped(CONFIG, tmp_path, 5, monkeypatch)
    steps: list[int] = []
    monkeypatch.setattr(loop, "_log_step", lambda training, *_: steps.append(training.step))
    loop.run(replace(CONFIG, resume=False), tmp_path, quiet=True)
    assert steps == list(range(1, 21))


def test_a_preemption_notice_saves_and_leaves(tmp_path: Path) -> None:
    (tmp_path / "notice").touch()
    config = replace(CONFIG, preempt_file=tmp_path / "notice")
    with pytest.raises(Stopped, match="notice is there") as caught:
        loop.run(config, tmp_path / "run", quiet=True)
    assert caught.value.code == 143
    saved = Checkpoints(tmp_path / "run/checkpoints").load()
    assert saved is not None and saved["counters"]["step"] == 1


def test_events_of_an_epoch_s_end_are_in_the_checkpoint_s_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The executor hands them out at the next step, which a resumed run has not taken.
    kind = type(prepare(CONFIG, data()).executor)
    inner = kind.end_epoch

    def end_epoch(self: Any, **metrics: float) -> None:
        inner(self, **metrics)
        self._emit([Event(self.signals.step, "switch", "at the epoch's end")])

    monkeypatch.setattr(kind, "end_epoch", end_epoch)
    stopped(CONFIG, tmp_path, 10, monkeypatch)
    loop.run(CONFIG, tmp_path, quiet=True)
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["kind"] == "switch"] == [10, 20]


@pytest.mark.parametrize("mode", MODES)
def test_same_seed_same_row_and_another_seed_another(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert mode in modes.names()
    few = digits_module.load(seed=0, subset=400)
    monkeypatch.setattr(loop, "_load", lambda config: few)
    config = replace(CONFIG, mode=mode, epochs=1, batch_size=30)
    one = row_of(loop.run(config, tmp_path / "one", quiet=True))
    torch.manual_seed(99)  # what came before does not matter
    two = row_of(loop.run(config, tmp_path / "two", quiet=True))
    other = row_of(loop.run(replace(config, seed=7), tmp_path / "other", quiet=True))
    assert one == two
    assert one["test_loss"] != other["test_loss"]
    metrics = (tmp_path / "one/metrics.csv").read_bytes()
    assert metrics == (tmp_path / "two/metrics.csv").read_bytes()


def test_every_global_generator_is_seeded() -> None:
    def drawn() -> list[float]:
        prepare(CONFIG, data())
        return [random.random(), float(np.random.rand()), float(torch.rand(()))]  # noqa: NPY002

    assert drawn() == drawn()


def test_modes_share_initialisation_and_order_and_differ_in_adaptation_alone(tmp_path: Path) -> None:
    first = {}
    for mode in ("baseline", "lookahead_only", "full"):
        training = prepare(replace(CONFIG, mode=mode), data())
        losses = training.task.losses(next(iter(training.batches)))
        first[mode] = {name: float(loss.detach()) for name, loss in losses.items()}
    assert first["baseline"] == first["lookahead_only"] == first["full"]


@pytest.mark.parametrize("mode", ["baseline", "full"])
def test_permuted_test_labels_change_only_test_columns(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(CONFIG, mode=mode, epochs=1)
    plain = loop.run(config, tmp_path / "plain", quiet=True)
    test = data().test
    permuted = replace(data(), test=Split(test.images, test.labels.roll(1)))
    monkeypatch.setattr(loop, "_load", lambda config: permuted)
    other = loop.run(config, tmp_path / "permuted", quiet=True)
    timing = {"train_seconds", "peak_memory_mb", "steps_per_second"}
    changed = {name for name in plain if plain[name] != other[name]} - timing
    assert changed == {"test_accuracy", "test_loss", "test_calibration_error"}
    for file in ("metrics.csv", "events.jsonl"):
        assert (tmp_path / "plain" / file).read_bytes() == (tmp_path / "permuted" / file).read_bytes()


def test_a_run_told_to_leaves_the_test_split_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = loop.run(replace(CONFIG, epochs=1), tmp_path / "plain", quiet=True)
    nothing = replace(data(), test=Split(data().test.images[:0], data().test.labels[:0]))
    monkeypatch.setattr(loop, "_load", lambda config: nothing)
    blind = loop.run(replace(CONFIG, epochs=1, read_test=False), tmp_path / "blind", quiet=True)
    assert blind["test_accuracy"] is None and blind["test_loss"] is None
    assert blind["select_accuracy"] == plain["select_accuracy"]


def test_base_only_trains_on_the_base_alone_and_base_only_all_on_all_held_in_data() -> None:
    alone = prepare(replace(CONFIG, mode="base_only"), data())
    whole = prepare(replace(CONFIG, mode="base_only_all"), data())
    assert set(alone.task.losses(torch.arange(10))) == {"cross_entropy"}
    assert [w for w in alone.executor.weights.values() if w] == [1.0]
    assert len(alone.task.splits["train"]) == 1000 and len(whole.task.splits["train"]) == 1300
    assert len(whole.batches) == 13


def test_what_is_trained_on_is_no_select_split(tmp_path: Path) -> None:
    whole = loop.run(replace(CONFIG, mode="base_only_all", epochs=1), tmp_path, quiet=True)
    assert whole["select_accuracy"] is None and not any(name.startswith("select_loss") for name in whole)
    assert "select" not in (tmp_path / "metrics.csv").read_text()


def test_a_run_that_never_stepped_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="every one of its 5 steps was rejected"):
        loop.run(replace(CONFIG, weights={"cross_entropy": 1e300}, batch_size=200, epochs=1), tmp_path, quiet=True)
    assert not (tmp_path / "result.json").exists()


def test_start_weights_are_honoured_in_every_mode() -> None:
    for mode in ("baseline", "full", "base_only"):
        training = prepare(replace(CONFIG, mode=mode, weights={"mixup": 0.5, "confidence": 0.0}), data())
        weights = training.executor.weights
        assert weights["mixup"] == (0.0 if mode == "base_only" else 0.5) and weights["confidence"] == 0.0
        assert "confidence" not in training.task.losses(torch.arange(10))


@pytest.mark.parametrize("mode", ["baseline", "full", "base_only"])
def test_the_vae(mode: str, tmp_path: Path) -> None:
    result = loop.run(replace(CONFIG, task="vae", mode=mode), tmp_path, quiet=True)
    assert result["status"] == "ok" and result["test_accuracy"] is None and result["select_accuracy"] is None
    parts = result["test_reconstruction"] + result["test_kl"]  # type: ignore[operator]
    assert math.isclose(result["test_loss"], parts, rel_tol=1e-6)  # type: ignore[arg-type]
    assert "NaN" not in (tmp_path / "result.json").read_text()


def test_the_number_of_threads_and_the_test_split_are_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, asked = torch.get_num_threads(), []
    kind = type(prepare(CONFIG, data()).task)
    inner = kind.evaluate
    monkeypatch.setattr(kind, "evaluate", lambda self, split: asked.append(split) or inner(self, split))
    loop.run(CONFIG, tmp_path, quiet=True)
    assert torch.get_num_threads() == before
    assert asked.count("test") == 1 and asked.index("test") == len(asked) - 1


@pytest.mark.parametrize("changes", [{"epochs": 0}, {"lr": math.nan}, {"batch_size": 2000}, {"weights": {"no": 1.0}}])
def test_what_cannot_be_trained_is_a_usage_error(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        loop.run(replace(CONFIG, **changes), tmp_path, quiet=True)


def test_a_rule_that_the_first_step_refuses_leaves_the_folder_free(tmp_path: Path) -> None:
    spec = Spec("baseline", CONFIG, tmp_path)
    with pytest.raises(UsageError, match="needs noise levels"):
        loop.run(replace(CONFIG, weighting="min_snr"), tmp_path, quiet=True)
    check_folders([spec])
    (row,) = run_all([replace(spec, config=replace(CONFIG, epochs=1))], jobs=1, quiet=True)
    assert row["status"] == "ok"
    with pytest.raises(UsageError, match="belongs to another configuration"):
        check_folders([spec])


def test_a_run_that_is_lost_raises_and_leaves_no_result(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        loop.run(replace(CONFIG, lr=1e30, epochs=4), tmp_path, quiet=True)
    assert not (tmp_path / "result.json").exists()


def test_shares() -> None:
    assert shares({"a": 3.0, "b": -1.0}, {"a": 1.0, "b": 1.0}) == {"a": 0.75, "b": 0.25}
    assert shares({"a": 0.0}, {"a": 1.0}) == {"a": 0.0}
