"""A few kills of a study; ``make torture`` does 200. And what the kills found."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections import Counter
from functools import partial
from pathlib import Path

import pytest

from adaptive_loss.errors import RunError
from adaptive_loss.ledger import FILE_NAME, Ledger, line_of
from adaptive_loss.records import Row
from tests.reliability.kills import RESULTS, killed
from tests.reliability.stub_study import TRAININGS, ablate, ended, forked


def test_kills_lose_nothing() -> None:
    row = killed(6)
    assert (row.trials, row.failures) == (6, 0), row.note


def test_one_that_is_killed_at_once_has_said_nothing(tmp_path: Path) -> None:
    """Found by the torture: a kill before the child had made the file for what it says ended the torture."""
    process = forked(lambda: time.sleep(60) or 0, tmp_path / "said.txt")
    assert (tmp_path / "said.txt").exists()
    os.kill(process, signal.SIGKILL)
    assert ended(process) == -signal.SIGKILL


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished study of two modes and two seeds."""
    folder = tmp_path_factory.mktemp("done") / "study"
    assert command(folder) == 0, said(folder)
    return folder


@pytest.fixture
def folder(done: Path, tmp_path: Path) -> Path:
    """A copy of it to spoil."""
    shutil.copytree(done, tmp_path / "study")
    return tmp_path / "study"


def command(folder: Path) -> int:
    """The study's command, in a process of its own."""
    return ended(forked(partial(ablate, folder), folder.with_suffix(".txt")))


def said(folder: Path) -> str:
    return folder.with_suffix(".txt").read_text()


def times_trained(folder: Path) -> dict[str, int]:
    return Counter((folder / TRAININGS).read_text().splitlines())


@pytest.mark.parametrize("lost", ["ablation_results.csv", "ablation_results.json"])
def test_a_kill_between_the_two_results_files_is_mended(folder: Path, done: Path, lost: str) -> None:
    """Found by the torture: a csv without its json was refused as a stranger's, a stale json stayed for good."""
    whole = (done / lost).read_text()
    (folder / lost).write_text(whole.replace("full", "baseline", 1))
    assert command(folder) == 0, said(folder)
    if lost == RESULTS:
        assert (folder / lost).read_text() == whole
    else:
        assert (folder / RESULTS).read_bytes() == (done / RESULTS).read_bytes()
    (folder / RESULTS).unlink()
    assert command(folder) == 0, said(folder)
    assert (folder / RESULTS).read_bytes() == (done / RESULTS).read_bytes()
    assert set(times_trained(folder).values()) == {1}


def test_a_study_from_before_the_ledger_gets_one_and_keeps_its_results(folder: Path, done: Path) -> None:
    (folder / FILE_NAME).unlink()
    assert command(folder) == 0, said(folder)
    with Ledger(folder) as ledger:
        assert len(ledger.rows()) == 4
    for name in (RESULTS, "ablation_results.json"):
        assert (folder / name).read_bytes() == (done / name).read_bytes()
    assert set(times_trained(folder).values()) == {1}


def test_a_failed_row_stays_in_the_results_until_its_run_has_ended_again(folder: Path) -> None:
    shutil.rmtree(folder / "full/seed_2")
    with Ledger(folder) as ledger:
        ledger.begin(folder / RESULTS, {"modes": ["baseline", "full"], "seeds": [1, 2]}, [], {})
        ledger.add(Row.failed("full", 2, "NaN"))
        ledger.write_results()
        assert "full,2,failed: NaN" in (folder / RESULTS).read_text()
    shutil.rmtree(folder / "full/seed_1")
    assert command(folder) == 0
    assert "failed" not in (folder / RESULTS).read_text()
    assert times_trained(folder) == {"baseline 1": 1, "baseline 2": 1, "full 1": 2, "full 2": 2}


def test_a_second_process_is_refused_in_one_line_and_touches_nothing(folder: Path) -> None:
    shutil.rmtree(folder / "full")
    with Ledger(folder):
        before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        assert command(folder) == 1
        assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before
    expected = f"error: {folder} is in use by another process; wait for it or choose another output folder\n"
    assert said(folder) == expected
    assert command(folder) == 0


def test_a_damaged_ledger_is_told_and_a_new_one_is_made_from_the_runs(folder: Path) -> None:
    file = folder / FILE_NAME
    file.write_bytes(b"x" + file.read_bytes())
    assert command(folder) == 1
    assert "line 1 is damaged; move the file away" in said(folder)
    file.rename(file.with_suffix(".old"))
    assert command(folder) == 0, said(folder)
    with Ledger(folder) as ledger:
        assert len(ledger.rows()) == 4


def test_a_row_that_was_never_finished_is_no_row(folder: Path) -> None:
    with (folder / FILE_NAME).open("ab") as file:
        file.write(line_of({"at": 1.0, "kind": "row", "row": Row.failed("full", 1, "x").as_dict()})[:-1])
    assert command(folder) == 0
    assert "cut off" in said(folder)
    assert "failed" not in (folder / RESULTS).read_text()


def test_a_run_in_use_stops_the_study_before_it_is_touched(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from adaptive_loss.locks import run_lock

    monkeypatch.setattr("adaptive_loss.locks.PATIENCE_S", 0.0)
    run = folder / "full/seed_2"
    (run / "result.json").unlink()
    with run_lock(run):
        assert command(folder) == 1
        with pytest.raises(RunError), run_lock(run):
            pass
    assert said(folder).endswith(f"{run} is in use by another process; wait for it or choose another output folder\n")
    assert (run / "metrics.csv").exists() and not (run / "error.txt").exists()
