"""Checkpoints: what they carry, what they survive, and what they refuse."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from adaptive_loss.checkpoint import FORMAT, Checkpoints, gather, load_file, restore, save_file
from adaptive_loss.errors import RunError, UsageError
from adaptive_loss.seeding import seed_global


def state(value: float = 0.0, **counters: Any) -> dict[str, Any]:
    part = nn.Linear(2, 1)
    nn.init.constant_(part.weight, value)
    return gather({"model": part}, **counters)


def value_of(saved: dict[str, Any] | None) -> float:
    assert saved is not None
    return float(saved["model"]["weight"][0, 0])


def files(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def draw() -> list[Any]:
    return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(3).tolist()]  # noqa: NPY002


def test_every_global_generator_goes_on_where_it_was(tmp_path: Path) -> None:
    draw()  # an odd number of normal draws, one of which the generators keep for later
    save_file(tmp_path / "one.pt", state())
    wanted = draw()
    draw()
    restore(load_file(tmp_path / "one.pt"), {})
    assert draw() == wanted


def test_taking_a_state_draws_nothing() -> None:
    part = nn.Linear(2, 1)
    seed_global(3)
    wanted = draw()
    seed_global(3)
    gather({"model": part})
    assert draw() == wanted


def test_counters_come_back_as_they_were() -> None:
    counters = {"epoch": 3, "sums": {"ce": [0.1 + 0.2, 7.0]}, "nan": float("nan")}
    assert repr(restore(state(**counters), {})) == repr(counters)


def test_a_part_that_is_missing_and_a_name_that_is_taken() -> None:
    with pytest.raises(RunError, match="holds no 'optimizer'"):
        restore(state(), {"optimizer": torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1)})
    with pytest.raises(ValueError, match="uses the name 'random' itself"):
        gather({"random": nn.Linear(1, 1)})


def test_the_last_two_stay_each_with_its_manifest(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path / "kept")
    for step in (5, 10, 15):
        kept.save(step, state(step))
    names = [f"step_{step:010d}.{kind}" for step in (10, 15) for kind in ("json", "pt")]
    assert files(tmp_path / "kept") == names
    manifest = json.loads((tmp_path / "kept" / names[-2]).read_text())
    content = (tmp_path / "kept" / names[-1]).read_bytes()
    assert (manifest["file"], manifest["format"], manifest["size"]) == (names[-1], FORMAT, len(content))
    assert value_of(Checkpoints(tmp_path / "kept").load()) == 15
    kept.clear()
    assert not (tmp_path / "kept").exists()
    assert Checkpoints(tmp_path / "kept").load() is None


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "gone", "manifest"])
def test_a_damaged_newest_falls_back_to_the_one_before_in_one_line(
    damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = Checkpoints(tmp_path)
    kept.save(5, state(5))
    kept.save(10, state(10))
    spoil(tmp_path / "step_0000000010.pt", damage)
    again = Checkpoints(tmp_path)
    assert value_of(again.load()) == 5
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "step_0000000010" in said and said.endswith("; going on from the one before\n")
    # It goes on more slowly than it came here: the damaged one, whose number is higher, must not stay in the way.
    again.save(7, state(7))
    again.save(8, state(8))
    assert value_of(Checkpoints(tmp_path).load()) == 8
    assert capsys.readouterr().err == ""


def test_two_damaged_ones_start_from_the_beginning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = Checkpoints(tmp_path)
    for step in (5, 10):
        kept.save(step, state(step))
        spoil(tmp_path / f"step_{step:010d}.pt", "flip")
    assert Checkpoints(tmp_path).load() is None
    assert capsys.readouterr().err.endswith("; starting from the beginning\n")


def spoil(file: Path, damage: str) -> None:
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "gone":
        file.unlink()
    else:
        file.with_suffix(".json").write_text("{")


def test_a_format_that_is_not_known_is_refused_by_name(tmp_path: Path) -> None:
    Checkpoints(tmp_path).save(5, state() | {"format": 7})
    with pytest.raises(UsageError, match="has checkpoint format 7, this adaptive_loss reads 2"):
        Checkpoints(tmp_path).load()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x05cos\nsystem\n", b"<html>"])
def test_what_is_no_checkpoint_is_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(RunError, match=r"x\.pt is damaged or no checkpoint") as caught:
        load_file(tmp_path / "x.pt")
    assert "\n" not in str(caught.value)


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "executed",))

    torch.save({"format": FORMAT, "model": Hostile()}, tmp_path / "x.pt")
    with pytest.raises(RunError, match="damaged or no checkpoint"):
        load_file(tmp_path / "x.pt")
    assert not (tmp_path / "executed").exists()


def test_a_failed_save_leaves_the_ones_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    kept = Checkpoints(tmp_path)
    kept.save(5, state(5))
    before = files(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(RunError, match="No space left on device"):
        patch.setattr("os.fsync", full)
        kept.save(10, state(10))
    assert files(tmp_path) == before
    assert value_of(Checkpoints(tmp_path).load()) == 5


def test_what_lies_beside_is_left_alone(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path / "kept")
    kept.save(5, state())
    (tmp_path / "kept/best.pt").write_text("mine")
    (tmp_path / "kept/.step_0000000005.pt.0123.tmp").write_text("left by a kill")
    kept.save(10, state())
    kept.clear()
    assert files(tmp_path / "kept") == ["best.pt"]


def test_a_manifest_nested_without_end_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "step_0000000001.json").write_text("[" * 100_000)
    assert Checkpoints(tmp_path).load() is None
    said = capsys.readouterr().err
    assert "is damaged" in said and said.count("\n") == 1
