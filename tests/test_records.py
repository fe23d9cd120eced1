"""Rows, files that are whole or not there, and where results come from."""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from adaptive_loss import records
from adaptive_loss.errors import RunError, UsageError
from adaptive_loss.records import Row, csv_cell, json_dump, read_results, write_atomic, write_results
from adaptive_loss.trainer import simple_ablation_analysis as analysis

ROOT = Path(__file__).resolve().parents[1]
HEADER = (
    "mode,seed,status,epochs,steps,test_accuracy,test_loss,select_accuracy,skipped_steps,interventions,train_seconds"
)


def make(mode: str, seed: int, accuracy: float = 0.7) -> Row:
    return Row(mode, seed, "ok", 30, 960, accuracy, 1 / 3, accuracy, 0, 12, 8.25)


class TestRow:
    def test_columns_are_the_contract(self) -> None:
        assert ",".join(records.COLUMNS) == HEADER
        assert list(make("full", 1).as_dict()) == HEADER.split(",")

    @pytest.mark.parametrize("row", [make("full", 1, 0.1 + 0.2), Row.failed("full", 2, 'a, "b"\nc')])
    def test_there_and_back(self, row: Row) -> None:
        assert Row.from_csv(row.to_csv()) == row

    def test_floats_keep_every_digit(self) -> None:
        assert "0.3333333333333333" in make("full", 1).to_csv()

    def test_a_failed_row_shows_no_metric(self) -> None:
        row = Row.failed("full", 1, "killed\nby \x1b[31m", test_accuracy=0.9, epochs=3)
        assert row.status == r"failed: killed by \x1b[31m"
        assert row.to_csv()[3:8] == ["3", "", "", "", ""]
        assert not row.ok

    @pytest.mark.parametrize("mode", ["=cmd", "", "a\nb", "<script>", "+1", "-x", "@x", "a,b", 'a"b'])
    def test_hostile_mode_names_are_refused(self, mode: str) -> None:
        with pytest.raises(UsageError, match="mode name"):
            Row(mode, 1)

    def test_status_is_checked(self) -> None:
        with pytest.raises(UsageError, match=r"Row\.failed"):
            Row("full", 1, "fine")
        with pytest.raises(ValueError, match="torn or damaged"):
            Row.from_csv(["full", "1"])


def test_cells_are_inert() -> None:
    assert [csv_cell(v) for v in (math.nan, -math.inf, None, True, 2, 1e-300)] == ["", "", "", "True", "2", "1e-300"]
    assert [csv_cell(v) for v in ("=1+1", "@x", "-2", "<script>")] == ["'=1+1", "'@x", "'-2", "<script>"]
    numpy = pytest.importorskip("numpy")
    assert [csv_cell(numpy.float64(0.1)), csv_cell(numpy.int64(3)), csv_cell(numpy.float64("nan"))] == ["0.1", "3", ""]


def test_json_is_strict() -> None:
    @dataclass
    class Config:
        folder: Path
        rates: tuple[float, ...]

    numpy = pytest.importorskip("numpy")
    value = {
        "config": Config(Path("results"), (1.0, math.nan)),
        "array": numpy.array([1.0, math.inf]),
        "scalar": numpy.float32(0.5),
        "set": {"b", "a"},
        3: math.inf,
    }
    assert json.loads(json_dump(value), parse_constant=pytest.fail) == {
        "config": {"folder": "results", "rates": [1.0, None]},
        "array": [1.0, None],
        "scalar": 0.5,
        "set": ["a", "b"],
        "3": None,
    }


class TestAtomic:
    def test_text_and_bytes_and_new_folders(self, tmp_path: Path) -> None:
        file = tmp_path / "a" / "b.txt"
        write_atomic(file, "grün\n")
        assert file.read_bytes() == "grün\n".encode()
        write_atomic(file, b"\x00")
        assert file.read_bytes() == b"\x00"
        assert os.listdir(file.parent) == ["b.txt"]

    @pytest.mark.parametrize("call", ["replace", "fsync"])
    @pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
    def test_a_failure_leaves_the_old_file(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, error: BaseException
    ) -> None:
        def fail(*_: object) -> None:
            raise error

        file = tmp_path / "results.csv"
        write_atomic(file, "old")
        monkeypatch.setattr(os, call, fail)
        with pytest.raises(RunError if isinstance(error, OSError) else KeyboardInterrupt) as caught:
            write_atomic(file, "new")
        if isinstance(error, OSError):
            assert str(caught.value).startswith(f"{file}: cannot be written (No space left")
        assert file.read_text() == "old"
        assert os.listdir(tmp_path) == ["results.csv"]

    def test_a_folder_in_the_way(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(RunError, match="cannot be written"):
            write_atomic(tmp_path / "file" / "below", "x")

    def test_kills_leave_a_whole_file(self, tmp_path: Path) -> None:
        file = tmp_path / "f"
        code = (
            "import sys; from adaptive_loss.records import write_atomic\n"
            "for n in range(10**9): write_atomic(sys.argv[1], str(n % 10) * 200_000)"
        )
        for _ in range(3):
            with subprocess.Popen([sys.executable, "-c", code, str(file)], cwd=ROOT) as writer:
                while not file.exists():
                    assert writer.poll() is None
                writer.kill()
            text = file.read_text()
            assert len(text) == 200_000
            assert len(set(text)) == 1
            file.unlink()


class TestResults:
    def write(self, folder: Path) -> Path:
        rows = [make("full", 42), make("baseline", 42, 0.6), Row.failed("full", 1, "NaN"), make("baseline", 1, 0.6)]
        config = {"modes": ["baseline", "full"], "lr": 1e-3}
        write_results(folder / "phase1_results.csv", rows, config, [("full", "baseline")], {"git": None})
        return folder / "phase1_results.csv"

    def test_csv(self, tmp_path: Path) -> None:
        lines = self.write(tmp_path).read_text().splitlines()
        assert lines[0] == HEADER
        assert [line.split(",")[:2] for line in lines[1:]] == [
            *(["baseline", "1"], ["baseline", "42"]),
            *(["full", "1"], ["full", "42"]),
        ]
        assert lines[3] == "full,1,failed: NaN,,,,,,,,"

    def test_json(self, tmp_path: Path) -> None:
        report = json.loads(self.write(tmp_path).with_suffix(".json").read_text(), parse_constant=pytest.fail)
        assert list(report) == ["config", "rows", "summary", "comparisons", "provenance"]
        assert report["rows"] == [row.as_dict() for row in read_results(tmp_path / "phase1_results.csv")]
        assert report["summary"]["full"] == {"n": 1, "failed": 1, "mean": 0.7, "std": None, "interval95": None}
        assert report["comparisons"] == [
            {"a": "full", "b": "baseline", "n_pairs": 1, "difference": pytest.approx(10), "interval95": None, "p": None}
        ]

    def test_same_rows_same_bytes_whatever_their_order(self, tmp_path: Path) -> None:
        rows = [make(mode, seed, 0.5 + seed / 7) for mode in analysis.MODES for seed in (1, 2, 3)]
        config = {"modes": analysis.MODES}
        write_results(tmp_path / "a.csv", rows, config)
        write_results(tmp_path / "b.csv", [row.as_dict() for row in reversed(rows)], config)
        for suffix in (".csv", ".json"):
            assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()

    def test_a_study_may_pass_mappings(self, tmp_path: Path) -> None:
        rows = [{"mode": "full", "seed": 1, "status": "failed: x", "epochs": 3, "note": "not a column"}]
        write_results(tmp_path / "r.csv", rows, {})
        assert read_results(tmp_path / "r.csv") == [Row("full", 1, "failed: x", 3)]

    def test_the_analysis_reads_it(self, tmp_path: Path) -> None:
        rows = [make(mode, seed, 0.5 + seed / 100) for mode in analysis.MODES for seed in range(5)]
        write_results(tmp_path / "ablation_results.csv", rows, {})
        assert analysis.main([str(tmp_path)]) == 0

    def test_damage_is_one_line(self, tmp_path: Path) -> None:
        file = self.write(tmp_path)
        file.write_text(file.read_text()[:-20])
        with pytest.raises(RunError, match=r"row 4: .* torn"):
            read_results(file)
        with pytest.raises(RunError, match="cannot be read"):
            read_results(tmp_path / "none.csv")

    def test_a_failed_reason_stays_one_cell(self, tmp_path: Path) -> None:
        write_results(tmp_path / "r.csv", [Row.failed("full", 1, '=cmd|"a",\n<script>')], {})
        with (tmp_path / "r.csv").open(newline="") as file:
            assert list(csv.reader(file))[1][2] == 'failed: =cmd|"a", <script>'


class TestProvenance:
    def test_what_it_says(self) -> None:
        said = records.provenance(["adaptive-loss", "ablate", "--output", "~/my results"], start=0.0)
        assert said["command"] == "adaptive-loss ablate --output '~/my results'"
        assert said["started"] == "1970-01-01T00:00:00Z"
        assert said["seconds"] > 0
        assert said["packages"]["torch"]
        assert said["cpu"]["count"] >= 1
        assert json.loads(json_dump(said)) == said

    def test_git(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in [name for name in os.environ if name.startswith("GIT_")]:
            monkeypatch.delenv(name)
        assert records._git(tmp_path) is None
        run = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run([*run, "init", "-q"], check=True)
        assert records._git(tmp_path) is None  # no revision yet
        (tmp_path / "f").write_text("1")
        subprocess.run([*run, "add", "f"], check=True)
        subprocess.run([*run, "commit", "-qm", "x"], check=True)
        clean = records._git(tmp_path) or {}
        assert len(clean["revision"]) == 40
        assert not clean["dirty"]
        (tmp_path / "f").write_text("2")
        assert records._git(tmp_path) == {**clean, "dirty": True}

    def test_no_torch_is_imported(self) -> None:
        code = (
            "import sys, adaptive_loss.records as r, adaptive_loss.utils, adaptive_loss.utils.logging\n"
            "import adaptive_loss.utils.performance, adaptive_loss.report.pictures\n"
            "r.provenance([]); print([m for m in ('torch', 'numpy', 'matplotlib', 'rich') if m in sys.modules])"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
        assert done.stdout.strip() == "[]", done.stderr
