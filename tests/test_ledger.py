"""The ledger of a study: what is appended stays, what is torn is cut, damage is told; one process at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adaptive_loss import ledger as module
from adaptive_loss.errors import RunError, UsageError
from adaptive_loss.ledger import FILE_NAME, Ledger, line_of, record_of
from adaptive_loss.locks import RUNNING, run_lock
from adaptive_loss.records import Row, holds, read_results

ROOT = Path(__file__).resolve().parents[1]
CONFIG = {"modes": ["baseline", "full"], "seeds": [1, 2]}


def make(mode: str, seed: int, accuracy: float = 0.7) -> Row:
    return Row(mode, seed, "ok", 30, 960, accuracy, 1 / 3, accuracy, 0, 12, 8.25)


def opened(folder: Path, **changes: Any) -> Ledger:
    ledger = Ledger(folder)
    ledger.begin(folder / "ablation_results.csv", CONFIG | changes, [("full", "baseline")], {"command": "x"})
    return ledger


def filled(folder: Path) -> Path:
    """A ledger of three rows."""
    with opened(folder) as ledger:
        for row in (make("baseline", 1), make("full", 1, 0.8), Row.failed("full", 2, "NaN")):
            ledger.add(row)
        ledger.write_results()
    return folder / FILE_NAME


class TestLines:
    def test_there_and_back(self) -> None:
        record = {"at": 1.5, "kind": "row", "row": json.loads(json.dumps(make("full", 1).as_dict()))}
        assert record_of(line_of(record)) == record
        assert line_of(record).count(b"\n") == 1

    def test_the_checksum_is_that_of_the_rest(self) -> None:
        # printf '{"kind":"row","seed":1}' | sha256sum | cut -c1-16
        assert json.loads(line_of({"seed": 1, "kind": "row"}))["check"] == "bf4e9728dfa499ba"

    def test_every_altered_byte_is_seen(self) -> None:
        line = line_of({"at": 1.5, "kind": "row", "row": make("full", 1).as_dict()})
        for place in range(len(line)):
            altered = bytearray(line)
            altered[place] ^= 1
            assert record_of(bytes(altered)) is None, place

    @pytest.mark.parametrize(
        "record",
        [
            {"kind": "row", "row": {"mode": "=cmd", "seed": 1, "status": "ok"}},
            {"kind": "row", "row": {"mode": "full", "seed": "1", "status": "ok"}},
            {"kind": "row", "row": {"mode": "full", "seed": 1, "status": "ok", "steps": ["x"]}},
            {"kind": "row", "row": 3},
            {"kind": "study", "config": {"modes": 1, "seeds": []}, "pairs": [], "provenance": {}, "inside": True},
            {"kind": "study", "config": {"modes": [], "seeds": []}, "pairs": ["abc"], "provenance": {}, "inside": True},
            {"kind": "other"},
        ],
    )
    def test_a_right_checksum_alone_is_not_enough(self, record: dict[str, Any]) -> None:
        assert record_of(line_of({"at": 1.0, **record})) is None


class TestLedger:
    def test_the_results_are_derived_from_it(self, tmp_path: Path) -> None:
        filled(tmp_path)
        rows = read_results(tmp_path / "ablation_results.csv")
        assert rows == [make("baseline", 1), make("full", 1, 0.8), Row.failed("full", 2, "NaN")]
        report = json.loads((tmp_path / "ablation_results.json").read_text())
        assert report["config"] == CONFIG
        assert [(c["a"], c["b"]) for c in report["comparisons"]] == [("full", "baseline")]
        assert report["provenance"]["command"] == "x" and report["provenance"]["seconds"] >= 0

    def test_the_last_row_of_a_run_counts_and_the_same_one_is_not_added_again(self, tmp_path: Path) -> None:
        file = filled(tmp_path)
        before = file.read_bytes()
        with opened(tmp_path) as ledger:
            ledger.add(make("baseline", 1))
            assert file.read_bytes() == before  # with nothing to say, not even who asked
            ledger.add(make("full", 2, 0.9))
        with Ledger(tmp_path) as ledger:
            assert [(r["seed"], r["status"]) for r in ledger.rows() if r["mode"] == "full"] == [(1, "ok"), (2, "ok")]
            assert [record["kind"] for record in ledger.records].count("study") == 2

    def test_rows_of_no_interest_now_stay_but_are_not_written(self, tmp_path: Path) -> None:
        filled(tmp_path)
        with opened(tmp_path, seeds=[1, 3]) as ledger:
            ledger.add(make("full", 3))
            ledger.write_results()
            assert len(ledger.rows()) == 4
        assert {row.seed for row in read_results(tmp_path / "ablation_results.csv")} == {1, 3}

    def test_results_beside_the_folder(self, tmp_path: Path) -> None:
        with Ledger(tmp_path / "phase1") as ledger:
            ledger.begin(tmp_path / "phase1.csv", CONFIG, [], {})
            ledger.add(make("full", 1))
            ledger.write_results()
        assert read_results(tmp_path / "phase1.csv") == [make("full", 1)]

    def test_a_ledger_that_says_nothing_writes_nothing(self, tmp_path: Path) -> None:
        with opened(tmp_path) as ledger, pytest.raises(RunError, match="holds no study yet"):
            ledger.write_results()

    @pytest.mark.parametrize("tail", [b"{", b"\0" * 700, b'{"check": "0", "kind": "row"}\n', b"x\r\ny"])
    def test_a_torn_end_is_cut_off_and_told(
        self, tmp_path: Path, tail: bytes, capsys: pytest.CaptureFixture[str]
    ) -> None:
        file = filled(tmp_path)
        whole = file.read_bytes()
        file.write_bytes(whole + tail)
        with Ledger(tmp_path) as ledger:
            assert len(ledger.rows()) == 3
        assert file.read_bytes() == whole
        assert f"cut off {len(tail)} bytes" in capsys.readouterr().err

    def test_a_cut_anywhere_leaves_the_rows_before_it(self, tmp_path: Path) -> None:
        file = filled(tmp_path)
        whole = file.read_bytes()
        for length in range(0, len(whole), 7):
            file.write_bytes(whole[:length])
            with Ledger(tmp_path) as ledger:
                assert len(ledger.rows()) == max(0, whole[:length].count(b"\n") - 1)

    def test_damage_before_the_end_is_refused_and_nothing_is_cut(self, tmp_path: Path) -> None:
        file = filled(tmp_path)
        damaged = file.read_bytes().replace(b'"seed": 1', b'"seed": 7', 1)
        file.write_bytes(damaged)
        with pytest.raises(RunError, match=r"line 2 is damaged; move the file away"):
            Ledger(tmp_path)
        assert file.read_bytes() == damaged

    @pytest.mark.parametrize("failing", ["fsync", "write"])
    def test_a_full_disk_is_told_and_leaves_the_file_whole(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
    ) -> None:
        file = filled(tmp_path)
        whole = file.read_bytes()
        with opened(tmp_path) as ledger:
            if failing == "write":
                monkeypatch.setattr(ledger, "_file", Half(ledger._file))
            else:
                monkeypatch.setattr(module.os, "fsync", full)
            with pytest.raises(RunError, match=r"ledger\.jsonl: .*check the disk's space"):
                ledger.add(make("full", 2))
            monkeypatch.undo()
            assert file.read_bytes() == whole
            ledger.add(make("full", 2))
            assert len(ledger.rows()) == 3

    def test_a_folder_that_cannot_be(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(RunError, match="choose another folder"):
            Ledger(tmp_path / "file")

    def test_a_hostile_row_is_refused(self, tmp_path: Path) -> None:
        with opened(tmp_path) as ledger, pytest.raises(UsageError, match="mode name"):
            ledger.add({"mode": "=cmd", "seed": 1, "status": "ok"})

    def test_leftovers_of_killed_writers_go_and_other_files_stay(self, tmp_path: Path) -> None:
        for name in (".ablation_results.csv.0f.tmp", ".ablation_results.json.0f.tmp", ".other.csv.0f.tmp"):
            (tmp_path / name).touch()
        with opened(tmp_path):
            assert sorted(os.listdir(tmp_path)) == [".other.csv.0f.tmp", FILE_NAME]


def full(handle: int) -> None:
    raise OSError(28, "No space left on device")


class Half:
    """A file on a disk that takes half of what is written."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def fileno(self) -> int:
        return self.file.fileno()

    def write(self, data: bytes) -> int:
        return self.file.write(data[: len(data) // 2])


class TestLocks:
    def test_one_process_a_study(self, tmp_path: Path) -> None:
        with opened(tmp_path), pytest.raises(RunError, match="is in use by another process") as caught:
            Ledger(tmp_path)
        assert "\n" not in str(caught.value)
        Ledger(tmp_path).close()

    def test_a_dead_process_holds_nothing(self, tmp_path: Path) -> None:
        code = (
            "import os, sys; from pathlib import Path; from adaptive_loss.ledger import Ledger\n"
            "from adaptive_loss.locks import run_lock\n"
            "ledger = Ledger(sys.argv[1])\n"
            "with run_lock(Path(sys.argv[1])): os.kill(os.getpid(), 9)"
        )
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=False)
        assert done.returncode == -9
        assert (tmp_path / RUNNING).exists()  # which is how a dead run is told
        Ledger(tmp_path).close()
        with run_lock(tmp_path):
            pass
        assert not (tmp_path / RUNNING).exists()

    def test_one_process_a_run_whatever_becomes_of_the_marker(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("adaptive_loss.locks.PATIENCE_S", 0.0)
        with run_lock(tmp_path):
            assert (tmp_path / RUNNING).exists()
            with pytest.raises(RunError, match="is in use by another process"), run_lock(tmp_path):
                pass
            assert (tmp_path / RUNNING).exists()
        assert not (tmp_path / RUNNING).exists()

    def test_a_lock_on_a_marker_that_is_gone_is_none(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from adaptive_loss import locks

        real: Callable[[Any], bool] = locks.try_lock
        tries: list[int] = []

        def removed_meanwhile(file: Any) -> bool:
            tries.append(1)
            if len(tries) == 1:
                (tmp_path / RUNNING).unlink()  # by the holder before, between our opening the file and our lock
            return real(file)

        monkeypatch.setattr(locks, "try_lock", removed_meanwhile)
        with run_lock(tmp_path):
            assert len(tries) == 2
            assert (tmp_path / RUNNING).exists()


class TestHolds:
    @pytest.mark.parametrize("name", ["ablation_results.csv", "ablation_results.json"])
    def test_both_files_and_every_row(self, tmp_path: Path, name: str) -> None:
        filled(tmp_path)
        output = tmp_path / "ablation_results.csv"
        rows = [Row.failed("full", 2, "NaN"), make("full", 1, 0.8), make("baseline", 1)]
        assert holds(output, rows)
        assert not holds(output, rows[1:])
        assert not holds(output, [*rows[1:], make("full", 2)])
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[:-20])
        assert not holds(output, rows)
        (tmp_path / name).unlink()
        assert not holds(output, rows)
