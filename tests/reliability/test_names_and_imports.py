"""What a name may do, which is nothing, and what an import may do, which is nothing either."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.reliability import imports, names


def test_hostile_names_are_inert() -> None:
    pytest.importorskip("matplotlib")
    row = names.inert()
    assert row.failures == 0, row.note


def test_showing_results_asks_no_network() -> None:
    pytest.importorskip("tensorboard")
    row = names.offline()
    assert row.failures == 0, row.note


def test_importing_the_package_does_nothing() -> None:
    assert imports.did(["adaptive_loss"]) == {"adaptive_loss": []}
    row = imports.watched(["adaptive_loss.loss_executor", "adaptive_loss.trainer.loop", "adaptive_loss.cli"])
    assert row.failures == 0, row.note
    assert {"adaptive_loss.ledger", "adaptive_loss.weighting.dwa"} <= set(imports.modules())


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("open('here.txt', 'a')", "open here.txt for writing"),
        ("import os; os.open('here.txt', os.O_RDWR | os.O_CREAT)", "open here.txt for writing"),
        ("import subprocess; subprocess.run(['true'])", "subprocess.Popen"),
        ("import socket; socket.create_server(('127.0.0.1', 0))", "socket.bind"),
    ],
)
def test_the_watch_sees_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, what: str) -> None:
    (tmp_path / "guilty.py").write_text(line)
    monkeypatch.setattr(imports, "ROOT", tmp_path)
    assert any(what in fault for fault in imports.did(["guilty"])["guilty"])
