"""The demo, made small: it trains, says which arm won on paired seeds, and draws what the weights did."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import pytest

from adaptive_loss import demo
from adaptive_loss.trainer.studies import Result, Spec, failed_row


@pytest.fixture(scope="module", autouse=True)
def _short() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, scene in demo.SCENES.items():
            patch.setitem(demo.SCENES, name, replace(scene, config=replace(scene.config, epochs=1)))
        yield


def shown(folder: Path, *more: str) -> str:
    """What the demo of two seeds prints."""
    with redirect_stdout(io.StringIO()) as out:
        assert demo.main(["--seeds", "1", "2", "--jobs", "1", "--output-dir", str(folder), *more]) == 0
    return out.getvalue()


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a demo, and what it printed."""
    folder = tmp_path_factory.mktemp("demo")
    return folder, shown(folder)


def test_it_compares_draws_and_resumes(done: tuple[Path, str]) -> None:
    folder, printed = done
    assert "fewer than five seeds prove nothing" in printed and "digits VAE" in printed
    document = json.loads((folder / "verdict.json").read_text())
    for entry in document["verdict"]:
        assert entry["seeds"] == 2 and entry["failed"] == 0
        assert entry["difference"] == pytest.approx(entry["adaptive"] - entry["fixed"])
    assert (folder / "weights.png").stat().st_size > 10_000
    before = (folder / "vae" / "fixed" / "seed_1" / "result.json").read_bytes()
    assert json.loads(shown(folder, "--json"))["verdict"] == document["verdict"]
    assert (folder / "vae" / "fixed" / "seed_1" / "result.json").read_bytes() == before


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


def test_both_arms_start_from_the_same_weights(done: tuple[Path, str]) -> None:
    folder, _ = done
    for scene in demo.SCENES:
        arms = [json.loads((folder / scene / arm / "seed_1" / "result.json").read_text()) for arm in demo.ARMS]
        first = [arm["weights"]["schedule"][0] for arm in arms]
        assert first[0] == first[1]
