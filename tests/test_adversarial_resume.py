"""A run of several networks that was cut goes on to the last bit, pictures included."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from adaptive_loss.trainer import loop
from adaptive_loss.utils.config import RunConfig
from tests.reliability.bits import differences
from tests.test_loop import carried, curves, row_of, stopped

SHARED = {"batch_size": 100, "epochs": 2, "precision": "fp32", "device": "cpu", "mode": "full", "pictures_every": 5}
POINTS = RunConfig(task="gan_2d", dataset="gaussians_25", subset=1000, **SHARED)  # type: ignore[arg-type]
VQ = RunConfig(task="vqgan", dataset="digits", subset=260, **{**SHARED, "batch_size": 50})  # type: ignore[arg-type]
CASES = [(POINTS, 3), (POINTS, 8), (VQ, 1), (VQ, 3)]  # in an epoch and at its edge; before the switch-on and after it


@pytest.mark.parametrize(("config", "step"), CASES, ids=lambda value: getattr(value, "task", value))
def test_a_cut_run_goes_on_to_the_last_bit(
    config: RunConfig, step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = loop.run(config, tmp_path / "whole", quiet=True)
    stopped(config, tmp_path / "cut", step, monkeypatch)
    torch.manual_seed(99)  # another process
    again = loop.run(config, tmp_path / "cut", quiet=True)
    assert row_of(again) == row_of(whole)
    assert differences(carried(tmp_path / "cut"), carried(tmp_path / "whole")) == []
    assert curves(tmp_path / "cut") == curves(tmp_path / "whole")
    files = [file.relative_to(tmp_path / "whole") for file in (tmp_path / "whole").rglob("*.*")]
    pictures = sorted(file for file in files if file.suffix == ".png")
    assert pictures
    for name in (Path("metrics.csv"), Path("events.jsonl"), Path("tb/scalars.jsonl"), *pictures):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
