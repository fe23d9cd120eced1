"""The pictures of one run, drawn from its folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from adaptive_loss import cli
from adaptive_loss.picture import curves, intervention_steps, monitor_text

METRICS = """epoch,step,loss_ce,loss_off,weight_ce,weight_off
1,10,2.0,,1.0,0.0
2,20,1.5,,0.5,0.0
"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "full/seed_1"
    folder.mkdir(parents=True)
    (folder / "metrics.csv").write_text(METRICS)
    (folder / "events.jsonl").write_text('{"step": 12}\n{"step": 15}\n{"st')
    return folder


def test_curves_are_the_columns_of_the_terms_that_are_on(run: Path) -> None:
    assert curves(run, "loss") == {"step": [10.0, 20.0], "ce": [2.0, 1.5]}
    assert curves(run, "weight") == {"step": [10.0, 20.0], "ce": [1.0, 0.5]}


def test_a_torn_last_event_is_left_out_and_no_events_are_none(run: Path) -> None:
    assert intervention_steps(run) == [12, 15]
    (run / "events.jsonl").write_bytes(b'{"step": 1e999}\n\xff\n{"step": 3}\n' + b"[" * 100_000)
    assert intervention_steps(run) == [3]
    (run / "events.jsonl").unlink()
    assert intervention_steps(run) == []


def test_the_command_draws_into_the_run_or_elsewhere(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    assert cli.main(["picture", str(run)]) == 0
    assert (run / "weights.png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    assert cli.main(["picture", str(run), "--output_dir", str(tmp_path / "p"), "--format", "svg", "--json"]) == 0
    files = json.loads(capsys.readouterr().out)["files"]
    assert [Path(file).name for file in files] == ["weights.svg", "losses.svg"]
    assert all(Path(file).stat().st_size > 1000 for file in files)


SHADOW = {"rho": 0.0, "suggestions": {"lower 'kl'": 3, "reset": 1}, "residual": {"ce": 0.0, "kl": -0.4463}}


def test_it_says_what_a_monitor_in_shadow_would_have_done(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    (run / "result.json").write_text(json.dumps({"monitor": SHADOW}))
    assert cli.main(["picture", str(run)]) == 0
    done = "would have done: lower 'kl' 3x, reset 1x; its residual would stand at kl -0.45 nats"
    assert capsys.readouterr().out.splitlines()[0] == f"the monitor in shadow (rho 0) {done}"
    assert cli.main(["picture", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["monitor"].endswith(done)


def test_it_says_what_an_acting_monitor_did(run: Path) -> None:
    (run / "result.json").write_text(json.dumps({"monitor": {"rho": 1.0, "suggestions": {}, "residual": {"ce": 0.0}}}))
    assert monitor_text(run) == "the monitor did: nothing; its residual stands at 0 nats"


@pytest.mark.parametrize(
    "result", ["", "[]", "{}", '{"monitor": null}', '{"monitor": {"rho": 0}}', "[" * 100_000, '{"monitor": 3}']
)
def test_a_run_without_a_monitor_or_a_damaged_result_says_nothing(run: Path, result: str) -> None:
    assert monitor_text(run) is None
    (run / "result.json").write_text(result)
    assert monitor_text(run) is None


def test_a_stranger_s_result_cannot_steer_the_terminal(run: Path) -> None:
    (run / "result.json").write_text(json.dumps({"monitor": SHADOW | {"residual": {"\x1b[31m": 1.0}}}))
    assert "\x1b" not in (monitor_text(run) or "\x1b")


def test_a_file_where_the_pictures_should_go(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").write_text("mine")
    assert cli.main(["picture", str(run), "--output-dir", str(tmp_path / "mine")]) == 2
    assert "mine is a file, not a folder; choose another" in capsys.readouterr().err
    assert (tmp_path / "mine").read_text() == "mine"


@pytest.mark.parametrize(
    ("metrics", "code", "message"),
    [
        (None, 2, "has no metrics.csv: name a run's folder"),
        ("", 1, "is damaged or has no epoch yet"),
        ("epoch,step,loss_ce\n1,10,2.0\n", 1, "is damaged or has no epoch yet (KeyError: 'weight_ce')"),
        (METRICS.replace("1.5", "torn"), 1, "could not convert string to float"),
        (METRICS.replace("0.0\n", "0.0,7\n", 1), 1, "is damaged or has no epoch yet"),
        (METRICS.replace("1.5", "1" * 200_000), 1, "field larger than field limit"),
    ],
)
def test_a_folder_that_is_no_run_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], metrics: str | None, code: int, message: str
) -> None:
    if metrics is not None:
        (tmp_path / "metrics.csv").write_text(metrics)
    assert cli.main(["picture", str(tmp_path)]) == code
    assert message in (printed := capsys.readouterr().err) and printed.count("\n") == 1
