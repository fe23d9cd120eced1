"""What a run says while it runs, and the meters."""

from __future__ import annotations

import csv
import io
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from adaptive_loss.errors import RunError, UsageError
from adaptive_loss.utils.logging import RunLogger, progress
from adaptive_loss.utils.performance import Timer, peak_memory_mb, throughput


def quiet(folder: Path, **options: Any) -> RunLogger:
    return RunLogger(folder, tensorboard=False, **options)


def table(folder: Path) -> list[list[str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.reader(file))


def events(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "events.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=pytest.fail) for line in lines]


class TestMetrics:
    def test_the_first_row_fixes_the_columns(self, tmp_path: Path) -> None:
        with quiet(tmp_path) as log:
            log.epoch({"epoch": 1, "loss": 0.1 + 0.2, "note": "warm"})
            log.epoch({"loss": math.nan, "epoch": 2})
            with pytest.raises(UsageError, match="no column 'kl'"):
                log.epoch({"epoch": 3, "kl": 1.0})
        assert table(tmp_path) == [["epoch", "loss", "note"], ["1", "0.30000000000000004", "warm"], ["2", "", ""]]

    def test_rows_are_on_disk_at_once(self, tmp_path: Path) -> None:
        log = quiet(tmp_path, columns=["epoch"])
        assert table(tmp_path) == [["epoch"]]
        log.epoch({"epoch": 1})
        log.event(3, "skip", "NaN")
        assert table(tmp_path)[-1] == ["1"]
        assert len(events(tmp_path)) == 1
        log.close()
        log.close()

    def test_names_are_inert(self, tmp_path: Path) -> None:
        with quiet(tmp_path) as log:
            log.epoch({"=cmd": 1, "a\nb": 2, "<script>": "@x"})
            log.epoch({"=cmd": 3, "a\nb": 4})
        assert table(tmp_path) == [["'=cmd", r"a\nb", "<script>"], ["1", "2", "'@x"], ["3", "4", ""]]

    def test_a_run_goes_on_after_a_torn_line(self, tmp_path: Path) -> None:
        with quiet(tmp_path) as log:
            log.epoch({"step": 10, "loss": 1.0})
            log.event(10, "clamp", "bound")
        for name in ("metrics.csv", "events.jsonl"):
            with (tmp_path / name).open("a") as file:
                file.write('{"20,0.')
        with quiet(tmp_path) as log:
            log.epoch({"loss": 0.5, "step": 20})
            log.event(20, "clamp", "bound")
        assert table(tmp_path) == [["step", "loss"], ["10", "1.0"], ["20", "0.5"]]
        assert [event["step"] for event in events(tmp_path)] == [10, 20]

    def test_a_torn_header_is_begun_again(self, tmp_path: Path) -> None:
        (tmp_path / "metrics.csv").write_text("ste")
        with quiet(tmp_path, columns=["step"]) as log:
            log.epoch({"step": 1})
        assert table(tmp_path) == [["step"], ["1"]]

    def test_a_resume_drops_what_came_after_the_checkpoint(self, tmp_path: Path) -> None:
        with quiet(tmp_path) as log:
            for step in (10, 20, 30):
                log.epoch({"epoch": step // 10, "step": step})
                log.event(step, "action", "up")
                if step == 20:
                    saved = log.state_dict()
                    log.event(20, "skip", "a skipped step has the number of the one before")
        with quiet(tmp_path) as log:
            log.load_state_dict(saved)
            log.epoch({"epoch": 3, "step": 30})
        assert [row[1] for row in table(tmp_path)[1:]] == ["10", "20", "30"]
        assert [event["step"] for event in events(tmp_path)] == [10, 20]

    def test_a_resume_before_the_first_row_begins_the_metrics_again(self, tmp_path: Path) -> None:
        with quiet(tmp_path) as log:
            saved = log.state_dict()
            log.epoch({"old": 1})
        with quiet(tmp_path) as log:
            log.load_state_dict(saved)
            log.epoch({"new": 2})
        assert table(tmp_path) == [["new"], ["2"]]

    def test_rows_that_are_lost_are_told(self, tmp_path: Path) -> None:
        with quiet(tmp_path) as log:
            log.epoch({"step": 10})
            saved = log.state_dict()
        (tmp_path / "metrics.csv").write_text("step\n")
        with quiet(tmp_path) as log, pytest.raises(RunError, match=r"metrics\.csv is shorter .* --no-resume"):
            log.load_state_dict(saved)

    def test_a_folder_that_cannot_be(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(RunError, match="choose another folder"):
            quiet(tmp_path / "file")

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
    def test_a_full_disk_is_told(self, tmp_path: Path) -> None:
        with quiet(tmp_path, columns=["step"]) as log:
            log._metrics.close()
            log._metrics = open("/dev/full", "ab", buffering=0)  # noqa: SIM115
            with pytest.raises(RunError, match=r"/dev/full: cannot be written .No space left"):
                log.epoch({"step": 1})


class TestEvents:
    def test_strict_json(self, tmp_path: Path) -> None:
        with quiet(tmp_path) as log:
            log.event(7, "skip", "loss 'kl' is NaN\n<script>", term="kl", before=math.nan, after={"kl": math.inf})
        assert events(tmp_path) == [
            {
                "step": 7,
                "kind": "skip",
                "reason": "loss 'kl' is NaN\n<script>",
                "term": "kl",
                "before": None,
                "after": {"kl": None},
            }
        ]


class TestTensorBoard:
    def test_curves(self, tmp_path: Path) -> None:
        pytest.importorskip("tensorboard")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        with RunLogger(tmp_path) as log:
            for step in range(3):
                log.scalars(step, {"weights/kl": 1.0 / (step + 1), "bad": math.nan})
        curves = EventAccumulator(str(tmp_path / "tb"))
        curves.Reload()
        assert curves.Tags()["scalars"] == ["weights/kl"]
        assert [event.value for event in curves.Scalars("weights/kl")] == pytest.approx([1, 1 / 2, 1 / 3])

    def test_a_resume_hides_the_curves_that_came_later(self, tmp_path: Path) -> None:
        pytest.importorskip("tensorboard")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        with RunLogger(tmp_path) as log:
            for step in (10, 20, 30):
                log.scalars(step, {"loss": float(step)})
                if step == 20:
                    saved = log.state_dict()
        with RunLogger(tmp_path) as log:
            log.load_state_dict(saved)
            log.scalars(30, {"loss": 31.0})
        curves = EventAccumulator(str(tmp_path / "tb"))
        curves.Reload()
        assert [(event.step, event.value) for event in curves.Scalars("loss")] == [(10, 10), (20, 20), (30, 31)]

    def test_without_it_one_line_and_on(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
        with RunLogger(tmp_path) as log:
            log.scalars(1, {"a": 1.0})
            log.scalars(2, {"a": 1.0})
            log.epoch({"epoch": 1})
        assert capsys.readouterr().err == "no TensorBoard curves; to have them: pip install tensorboard\n"
        assert len(table(tmp_path)) == 2


class TestProgress:
    def test_at_most_a_line_every_ten_seconds(self) -> None:
        now = 0.0
        stream = io.StringIO()
        with progress(100, "training", stream=stream, clock=lambda: now) as bar:
            for step in range(1, 101):
                now = step * 0.5
                bar.update(1, f"loss {1 / step:.3f}")
        lines = stream.getvalue().splitlines()
        assert lines[0] == "training: step 20/100, loss 0.050, 2.0 steps/s"
        assert len(lines) == 5

    def test_a_short_run_leaves_one_line(self) -> None:
        stream = io.StringIO()
        with progress(2, "training", stream=stream, clock=lambda: 0.0) as bar:
            bar.update(2)
        assert stream.getvalue() == "training: step 2/2\n"

    def test_it_keeps_off_standard_output(self, capsys: pytest.CaptureFixture[str]) -> None:
        with progress(1, "training") as bar:
            bar.update()
        assert capsys.readouterr().out == ""

    def test_a_bar_on_a_terminal(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("rich")
        monkeypatch.setenv("TERM", "xterm")
        stream = io.StringIO()
        stream.isatty = lambda: True  # type: ignore[method-assign]
        with progress(3, "[bold]x", stream=stream) as bar:
            bar.update(3, "[red]loss")
        assert "[bold]x" in stream.getvalue()
        assert "3/3" in stream.getvalue()


class TestPerformance:
    def test_the_timer_adds_up(self) -> None:
        timer = Timer()
        for _ in range(2):
            with timer:
                time.sleep(0.01)
        stopped = timer.seconds
        time.sleep(0.01)
        assert timer.seconds == stopped >= 0.02
        assert timer.count == 2
        with timer, pytest.raises(RuntimeError, match="already running"):
            timer.__enter__()

    def test_the_timer_stops_on_an_error(self) -> None:
        timer = Timer()
        with pytest.raises(KeyError), timer:
            raise KeyError
        with timer:
            assert timer.seconds >= 0

    def test_memory_and_rate(self) -> None:
        assert 5 < peak_memory_mb() < 1e6
        assert throughput(10, 2) == 5
        assert throughput(10, 0) == 0
