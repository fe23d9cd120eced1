"""``adaptive-loss rebuild``: results from the ledger, TensorBoard files from the logs."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from adaptive_loss import cli
from adaptive_loss.errors import RunError, UsageError
from adaptive_loss.ledger import FILE_NAME, Ledger
from adaptive_loss.locks import run_lock
from adaptive_loss.rebuild import curves, read_scalars, rebuild
from adaptive_loss.records import Row
from adaptive_loss.utils.logging import SCALARS, RunLogger

LINES = [(10, {"loss/ce": 0.5}), (20, {"loss/ce": 0.25, "weight/ce": 1.0})]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "study/full/seed_1"
    with RunLogger(folder, tensorboard=False) as log:
        for step, values in LINES:
            log.scalars(step, {**values, "bad": float("nan")})
    return folder


@pytest.fixture
def study(run: Path) -> Path:
    folder = run.parents[1]
    with Ledger(folder) as ledger:
        ledger.begin(folder / "ablation_results.csv", {"modes": ["full"], "seeds": [1]}, [], {})
        ledger.add(Row("full", 1, "ok", 1, 20, 0.5, 0.5, 0.5, 0, 0, 1.0))
        ledger.write_results()
    return folder


def test_a_study_s_results_and_its_runs_curves(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorboard")
    files = [study / "ablation_results.csv", study / "ablation_results.json"]
    before = [file.read_bytes() for file in files]
    files[0].unlink()
    assert cli.main(["rebuild", str(study), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["files"] == [*map(str, files), str(study / "full/seed_1/tb")]
    assert [file.read_bytes() for file in files] == before


def test_a_run_s_old_curves_are_replaced(run: Path) -> None:
    pytest.importorskip("tensorboard")
    from tests.reliability.tensorboard_files import shown

    (run / ".tb.new").mkdir()
    for left in ("tb/events.out.tfevents.1.a.1.0", ".tb.new/old", "tb/notes.txt"):
        (run / left).write_text("old")
    assert rebuild(run) == [run / "tb"]
    assert shown(run / "tb") == {"loss/ce": [(10, 0.5), (20, 0.25)], "weight/ce": [(20, 1.0)]}
    assert sorted(os.listdir(run)) == ["events.jsonl", "metrics.csv", "tb"]
    assert len(os.listdir(run / "tb")) == 3


def test_a_torn_last_line_is_left_out_and_a_damaged_one_is_named(run: Path) -> None:
    whole = (run / SCALARS).read_bytes()
    (run / SCALARS).write_bytes(whole + b'{"step": 30')
    assert list(read_scalars(run / SCALARS)) == LINES
    for line in (b"{}", b'{"step": -1, "values": {}}', b'{"step": 1, "values": {"a": NaN}}', b"\xff", b"[" * 100_000):
        (run / SCALARS).write_bytes(line + b"\n" + whole)
        with pytest.raises(RunError, match="line 1 is damaged"):
            list(read_scalars(run / SCALARS))


def test_a_run_that_goes_on_is_left_alone(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adaptive_loss.locks.PATIENCE_S", 0.0)
    with run_lock(run), pytest.raises(RunError, match="in use by another process"):
        curves(run)


def test_a_folder_of_something_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["rebuild", str(tmp_path)]) == 2
    assert "name a study's folder or a run's" in capsys.readouterr().err


def test_somebody_s_file_in_the_place_of_the_results_is_not_replaced(study: Path) -> None:
    mine = study.with_name("study.csv")
    mine.write_text("mine")
    with Ledger(study) as ledger:
        ledger.begin(mine, {"modes": ["full"], "seeds": [1]}, [], {})
        ledger.add(Row.failed("full", 1, "NaN"))
    with pytest.raises(UsageError, match="move it away"):
        rebuild(study)
    assert mine.read_text() == "mine"


@pytest.mark.parametrize("name", [FILE_NAME, f"full/seed_1/{SCALARS}", "full/seed_1/running", "full/seed_1/.tb.new"])
def test_links_out_of_a_stranger_s_folder_are_not_followed(study: Path, tmp_path: Path, name: str) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes((study / name).read_bytes() if (study / name).exists() else b"")
    before = outside.read_bytes()
    (study / name).unlink(missing_ok=True)
    (study / name).symlink_to(outside)
    with pytest.raises(UsageError, match="link to another place"):
        rebuild(study)
    assert outside.read_bytes() == before
