"""The runner of ``make torture``."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.reliability import __main__ as runner
from tests.reliability import forks
from tests.reliability.one import divided
from tests.reliability.rows import Row

HEAD = "from tests.reliability.rows import Row\n\ndef torture():\n    "


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose modules the runner's processes can import."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


def test_modules_are_found_by_their_function(modules: Path) -> None:
    (modules / "good.py").write_text(HEAD + "return Row('x', 1, 0)")
    (modules / "helper.py").write_text("class A:\n    def torture(self): ...")
    assert runner.find(modules) == ["good"]
    assert set(runner.find()) >= {"kills", "strangers"}


def test_one_row_and_several(modules: Path) -> None:
    (modules / "good.py").write_text(HEAD + "return Row('x', 3, 0, 'fine')")
    (modules / "several.py").write_text(HEAD + "print('noise'); return [Row('a', 1, 0), Row('b', 2, 1)]")
    assert runner.run("good") == [Row("x", 3, 0, "fine")]
    told: list[Row] = []
    rows = runner.run_all(["several", "good"], told.append)
    assert [row.promise for row in rows] == ["a", "b", "x"]
    assert sorted(row.promise for row in told) == ["a", "b", "x"]


def test_what_dies_or_hangs_is_a_failed_row(modules: Path) -> None:
    (modules / "raises.py").write_text(HEAD + "raise ValueError('no luck')")
    (modules / "hangs.py").write_text(HEAD + "import time; time.sleep(60)")
    (row,) = runner.run("raises")
    assert (row.failures, row.note) == (1, "exit code 1: ValueError: no luck")
    (row,) = runner.run("hangs", limit_s=1)
    assert (row.failures, row.note) == (1, "not done within 1 s")


def test_a_module_hears_ctrl_c_though_its_shell_made_it_deaf(modules: Path) -> None:
    (modules / "hears.py").write_text(
        HEAD + "import signal; return Row('x', 1, int(signal.getsignal(signal.SIGINT) == signal.SIG_IGN))"
    )
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert runner.run("hears") == [Row("x", 1, 0)]
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_child_has_a_log_before_it_can_be_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fork", lambda: 1)
    forks.start(lambda: None, tmp_path / "said.txt")
    assert (tmp_path / "said.txt").exists()


def test_quick_divides_and_leaves_one(modules: Path) -> None:
    def torture(kills: int = 200, times: int = 5, rules: tuple[str, ...] = ("dwa",)) -> None: ...

    assert divided(torture, 1) == {"kills": 200, "times": 5}
    assert divided(torture, 10) == {"kills": 20, "times": 1}
    (modules / "counts.py").write_text(HEAD.replace("torture()", "torture(n: int = 50)") + "return Row('x', n, 0)")
    assert runner.run("counts", 10) == [Row("x", 5, 0)]


def test_a_failure_is_seen_in_line_table_and_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [Row("a <b> | c", 1000, 0), Row("d", 2, 1, "lost a row")]
    monkeypatch.setattr(runner, "run_all", lambda modules, tell, divisor: [tell(row) or row for row in rows])
    assert runner.main([]) == 1
    printed = capsys.readouterr().out
    assert "ok   a <b> | c: 1000 trials, 0 failures\n" in printed
    assert "FAIL d: 2 trials, 1 failures (lost a row)\n" in printed
    page = runner.table(rows, "make torture", 3.0)
    assert "| a &lt;b> \\| c | 1,000 | 0 |  |\n| d | 2 | 1 | lost a row |\n" in page


def test_writing_needs_every_module() -> None:
    with pytest.raises(SystemExit):
        runner.main(["kills", "--write"])
