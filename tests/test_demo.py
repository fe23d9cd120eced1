"""The demo, made small: it trains, says which arm won on paired seeds, and draws what the weights did."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from adaptive_loss import demo
from adaptive_loss.trainer.studies import Result, Spec, failed_row


@pytest.fixture
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, scene in demo.SCENES.items():
        monkeypatch.setitem(demo.SCENES, name, replace(scene, config=replace(scene.config, epochs=1)))


@pytest.mark.usefixtures("_short")
def test_it_compares_draws_and_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--seeds", "1", "2", "--jobs", "1", "--output-dir", str(tmp_path)]
    assert demo.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "fewer than five seeds prove nothing" in printed and "digits VAE" in printed
    document = json.loads((tmp_path / "verdict.json").read_text())
    for entry in document["verdict"]:
        assert entry["seeds"] == 2 and entry["failed"] == 0
        assert entry["difference"] == pytest.approx(entry["adaptive"] - entry["fixed"])
    assert (tmp_path / "weights.png").stat().st_size > 10_000
    before = (tmp_path / "vae" / "fixed" / "seed_1" / "result.json").read_bytes()
    assert demo.main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["verdict"] == document["verdict"]
    assert (tmp_path / "vae" / "fixed" / "seed_1" / "result.json").read_bytes() == before


@pytest.mark.parametrize(
    ("seeds", "line"), [([], "--seeds is empty"), (["1", "1"], "1 is given twice"), (["-1"], "-1 is no seed")]
)
def test_bad_seeds_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], seeds: list[str], line: str
) -> None:
    assert demo.main(["--seeds", *seeds, "--output-dir", str(tmp_path / "out")]) == 2
    assert line in (printed := capsys.readouterr().err) and printed.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_runs_that_fail_leave_a_verdict_without_a_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_finish(specs: list[Spec], *_: object, **__: object) -> list[Result]:
        return [failed_row(spec, "no luck") for spec in specs]

    monkeypatch.setattr(demo, "run_all", none_finish)
    assert demo.main(["--seeds", "1", "--output-dir", str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert "no seed finished in both arms" in printed.out and "no run to draw" in printed.out
    assert "4 of 4 runs failed, the first: classifier/fixed seed 1 failed: no luck" in printed.err
    assert {entry["failed"] for entry in json.loads((tmp_path / "verdict.json").read_text())["verdict"]} == {2}


@pytest.mark.usefixtures("_short")
def test_both_arms_start_from_the_same_weights(tmp_path: Path) -> None:
    assert demo.main(["--seeds", "1", "--jobs", "1", "--output-dir", str(tmp_path)]) == 0
    for scene in demo.SCENES:
        arms = [json.loads((tmp_path / scene / arm / "seed_1" / "result.json").read_text()) for arm in demo.ARMS]
        first = [arm["weights"]["schedule"][0] for arm in arms]
        assert first[0] == first[1]
