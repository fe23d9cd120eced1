"""A run of several networks that was cut goes on to the last bit, pictures included."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from adaptive_loss.trainer import loop
from adaptive_loss.utils.config import RunConfig
from tests.reliability.bits import differences
from tests.test_loop import carried, curves, row_of, stopped

SHARED = {"batch_size": 100, "epochs": 2, "precision": "fp32", "device": "cpu", "mode": "full", "pictures_every": 5}
CONFIGS = {
    "gan_2d": RunConfig(task="gan_2d", dataset="gaussians_25", subset=1000, **SHARED),  # type: ignore[arg-type]
    "vqgan": RunConfig(task="vqgan", dataset="digits", subset=260, **{**SHARED, "batch_size": 50}),  # type: ignore[arg-type]
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, dict[str, Any]]]:
    """Folder and result of a task's run that nothing cut."""

    @cache
    def run(task: str) -> tuple[Path, dict[str, Any]]:
        folder = tmp_path_factory.mktemp(task)
        return folder, loop.run(CONFIGS[task], folder, quiet=True)

    return run


# in an epoch and at its edge; before the switch-on and after it
@pytest.mark.parametrize(("task", "step"), [("gan_2d", 3), ("gan_2d", 8), ("vqgan", 1), ("vqgan", 3)])
def test_a_cut_run_goes_on_to_the_last_bit(
    task: str,
    step: int,
    whole: Callable[[str], tuple[Path, dict[str, Any]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, result = whole(task)
    stopped(CONFIGS[task], tmp_path, step, monkeypatch)
    torch.manual_seed(99)  # another process
    assert row_of(loop.run(CONFIGS[task], tmp_path, quiet=True)) == row_of(result)
    assert differences(carried(tmp_path), carried(folder)) == []
    assert curves(tmp_path) == curves(folder)
    pictures = sorted(file.relative_to(folder) for file in folder.rglob("*.png"))
    assert pictures
    for name in (Path("metrics.csv"), Path("events.jsonl"), Path("tb/scalars.jsonl"), *pictures):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
