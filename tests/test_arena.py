"""The arena with stubbed runs: what is recovered of what tuning gains, by family, rule and start; and its table."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest

from adaptive_loss.tasks import tasks
from adaptive_loss.trainer import arena, study
from adaptive_loss.trainer.recovery import interquartile_mean, recovery
from adaptive_loss.utils.config import RunConfig
from tests.test_compare import Toy, stub

Arena = Callable[..., int]


class Flat(Toy):
    """A second family, whose fixed weights all do equally well."""

    datasets = ("digits",)


def run(config: RunConfig, folder: Path, *, quiet: bool) -> dict[str, Any]:
    row = stub(config, folder, quiet=quiet)
    if config.read_test:
        row["test_own_kid"] *= 1 + 0.02 * config.seed  # so that no two seeds differ by the same
    if config.task == "flat":
        row |= {"test_own_kid": 0.05 + 0.001 * config.seed, "select_own_kid": 0.05}
    if config.weighting == "dwa" and config.seed == 2:
        raise RuntimeError("it diverged")
    row["train_seconds"] = 3.0 if config.mode == "adaptive" else 2.0
    (folder / "result.json").write_text(json.dumps(row))
    return row


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Arena:
    """Run the command on the two families with stubbed training; its exit code."""
    for name, family in (("toy", Toy), ("flat", Flat)):
        monkeypatch.setitem(tasks._objects, name, family)
    for module in (arena, study):
        monkeypatch.setattr(module, "prepare", lambda settings: None)
    monkeypatch.setattr("adaptive_loss.trainer.loop.run", run)
    monkeypatch.setattr("adaptive_loss.trainer.studies.gc.collect", lambda: 0)

    def call(*flags: str, families: tuple[str, ...] = ("toy", "flat"), seeds: int = 5) -> int:
        always = ["--tasks", *families, "--seeds", *map(str, range(1, seeds + 1)), "--jobs", "1", "--trials", "8"]
        return arena.main([*always, "--output-dir", str(tmp_path / "out"), *flags])

    return call


def document(tmp_path: Path) -> dict[str, Any]:
    return json.loads((tmp_path / "out/arena.json").read_text())


def rows(values: Mapping[int, float]) -> list[dict[str, Any]]:
    return [{"seed": seed, "status": "ok", "test_loss": value} for seed, value in values.items()]


class TestRecovery:
    START = rows({1: 4.0, 2: 5.0, 3: 4.5, 4: 4.8, 5: 4.2})
    TUNED = rows({1: 2.0, 2: 2.9, 3: 2.6, 4: 2.8, 5: 2.2})

    @pytest.mark.parametrize("share", [-0.5, 0.0, 0.75, 1.0, 1.25])
    def test_an_arm_that_goes_a_share_of_the_way_recovers_that_share(self, share: float) -> None:
        pairs = zip(self.START, self.TUNED, strict=True)
        arm = [{**s, "test_loss": s["test_loss"] + share * (t["test_loss"] - s["test_loss"])} for s, t in pairs]
        found = recovery(arm, self.START, self.TUNED, "test_loss")
        assert found["recovered"] == pytest.approx(share)
        assert found["recovered95"] == pytest.approx([share, share])
        assert found["gain"] == pytest.approx(share * found["gap"]) and found["gap"] == pytest.approx(2.0)

    def test_accuracies_run_the_other_way(self) -> None:
        flipped = [
            [{**row, "test_accuracy": 1 - row["test_loss"] / 10} for row in arm] for arm in (self.START, self.TUNED)
        ]
        found = recovery(flipped[1], *flipped, "test_accuracy")
        assert found["recovered"] == pytest.approx(1.0) and found["gap"] == pytest.approx(20.0)

    WORSE: ClassVar = {1: 6.0, 2: 6.9, 3: 6.6, 4: 6.8, 5: 6.2}

    @pytest.mark.parametrize("tuned", [{1: 4.1, 2: 4.9, 3: 4.4, 4: 4.9, 5: 4.2}, WORSE, {1: 3.0}, {}])
    def test_over_a_gap_that_may_be_none_there_is_no_ratio(self, tuned: dict[int, float]) -> None:
        found = recovery(self.TUNED, self.START, rows(tuned), "test_loss")
        assert found["recovered"] is None and found["recovered95"] is None
        assert found["gain"] == pytest.approx(2.0)

    def test_only_seeds_that_finished_everywhere_count(self) -> None:
        arm = [{"seed": 1, "status": "failed: it diverged", "test_loss": math.nan}, *self.TUNED[1:]]
        assert recovery(arm, self.START, self.TUNED, "test_loss")["recovered"] == pytest.approx(1.0)
        assert recovery(arm[:1], self.START, self.TUNED, "test_loss")["recovered"] is None

    @pytest.mark.parametrize(
        ("values", "mean"),
        [
            ([], None),
            ([3.0], 3.0),
            ([1, 2], 1.5),
            ([0, 1, 2, 90], 1.5),
            ([0, 1, 2, 3, 90], (0.75 + 2 + 0.75 * 3) / 2.5),
        ],
    )
    def test_interquartile_mean(self, values: list[float], mean: float | None) -> None:
        assert interquartile_mean(values) == (None if mean is None else pytest.approx(mean))


def test_replays_lie_in_the_study_of_what_they_replay(play: Arena, tmp_path: Path) -> None:
    asked = ("--weightings", "adaptive", "dwa", "replay_mean", "--starts", "customary")
    assert play(*asked, families=("toy",)) == 1  # dwa's second seed
    cells = {cell["weighting"]: cell for cell in document(tmp_path)["cells"]}
    assert list(cells) == ["fixed", "adaptive", "replay_mean", "dwa"]
    assert [cells[name]["n"] for name in cells] == [5, 5, 5, 4]
    assert (tmp_path / "out/toy/adaptive/replay_mean/customary/seed_1").is_dir()
    assert not (tmp_path / "out/toy/replay_mean").exists()


def test_the_table(play: Arena, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert play("--weightings", "adaptive", "uncertainty", "--starts", "customary", "random*10") == 0
    found = document(tmp_path)
    cells = {(cell["task"], cell["weighting"], cell["start"]): cell for cell in found["cells"]}
    assert len(cells) == 2 * 3 * 2
    wrong = cells["toy", "adaptive", "random*10 (kl*10)"]
    assert wrong["gain"] == pytest.approx(0.02 * 1.06) and wrong["recovered"] == pytest.approx(
        wrong["gain"] / wrong["gap"]
    )
    assert wrong["cost"] == pytest.approx(1.5) and wrong["metric"] == "test_own_kid"
    assert cells["toy", "fixed", "random*10 (kl*10)"]["recovered"] == pytest.approx(0.0)
    assert cells["flat", "adaptive", "customary"]["recovered"] is None  # tuning gains nothing there
    assert found["summary"]["adaptive"]["with_gap"] == 2 and found["summary"]["adaptive"]["failure_rate"] == 0
    out = capsys.readouterr().out
    assert "toy: adaptive, random*10 (kl*10)" in out and "fewer than five" not in out
    header = (tmp_path / "out/arena.csv").read_text().splitlines()[0]
    assert header == ",".join(arena.CELLS)


def test_failed_runs_are_counted_and_the_code_says_so(
    play: Arena, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert play("--weightings", "dwa", "--starts", "customary", families=("toy",)) == 1
    assert document(tmp_path)["summary"]["dwa"]["failure_rate"] == pytest.approx(1 / 5)
    assert "it diverged" in capsys.readouterr().err


def test_a_rule_that_a_task_cannot_serve_is_left_out(
    play: Arena, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert play("--weightings", "geco", "adaptive", "--starts", "customary", families=("toy",)) == 0
    found = document(tmp_path)
    assert "geco" not in found["summary"] and "needs targets" in found["left_out"]["toy: geco"]
    assert "left out, toy: geco" in capsys.readouterr().out and not (tmp_path / "out/toy/geco").exists()


def test_another_rule_leaves_what_is_there_as_it_is(play: Arena, tmp_path: Path) -> None:
    assert play("--weightings", "adaptive", "--starts", "customary", families=("toy",)) == 0
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("result.json")}
    cells = document(tmp_path)["cells"]
    assert play("--weightings", "adaptive", "uncertainty", "--starts", "customary", families=("toy",)) == 0
    assert all(file.stat().st_mtime_ns == then for file, then in before.items())
    assert [cell for cell in document(tmp_path)["cells"] if cell["weighting"] != "uncertainty"] == cells


def test_a_table_is_not_replaced_by_one_that_holds_less(
    play: Arena, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert play("--weightings", "adaptive", "--starts", "customary") == 0
    there = (tmp_path / "out/arena.json").read_bytes()
    assert play("--weightings", "adaptive", "--starts", "customary", families=("toy",)) == 2
    assert "also holds flat" in capsys.readouterr().err and (tmp_path / "out/arena.json").read_bytes() == there
    (tmp_path / "out/arena.json").write_text("{}")
    assert play("--weightings", "adaptive", "--starts", "customary") == 2
    assert "is no table of an arena" in capsys.readouterr().err


def test_dry_run_and_json(play: Arena, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert play("--weightings", "adaptive", "--starts", "customary", "--dry-run", families=("toy",), seeds=2) == 0
    assert not (tmp_path / "out").exists()
    capsys.readouterr()
    assert play("--weightings", "adaptive", "--starts", "customary", "--json", families=("toy",), seeds=2) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["config"]["tasks"] == ["toy"] and set(shown["summary"]) == {"fixed", "adaptive"}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--weightings", "gradnom"], "gradnom"),
        (["--starts", "kl**3"], "is no start"),
        (["--starts", "beta*10"], "unknown term 'beta'"),
        (["--seeds", "1", "1"], "given twice"),
        (["--jobs", "-1"], "--jobs is -1"),
        (["--epochs", "0"], "epochs"),
    ],
)
def test_bad_input_is_one_line_and_code_2(
    play: Arena, capsys: pytest.CaptureFixture[str], flags: list[str], said: str
) -> None:
    assert play(*flags, families=("toy",)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and said in lines[0]
