"""Pictures that a run draws: the grid, the file, and when they come."""

from __future__ import annotations

import builtins
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adaptive_loss.data.digits import load
from adaptive_loss.errors import UsageError
from adaptive_loss.trainer import loop
from adaptive_loss.utils.config import RunConfig, differences, validate
from adaptive_loss.utils.logging import RunLogger
from adaptive_loss.utils.pictures import GAP, TILE, grid, png

CONFIG = RunConfig(task="vae", dataset="digits", epochs=1, batch_size=100, precision="fp32", device="cpu")


def test_a_grid_goes_row_by_row_and_enlarges_in_whole_steps() -> None:
    images = torch.zeros(3, 1, 20, 20)
    images[1], images[2] = 1.0, 0.5
    image = grid(images)
    side = 20 * (TILE // 20)
    assert image.shape == (2 * side + 3 * GAP, 2 * side + 3 * GAP, 3) and image.dtype == np.uint8
    assert (image[:GAP] == 255).all() and (image[GAP : GAP + side, GAP : GAP + side] == 0).all()
    assert (image[GAP : GAP + side, 2 * GAP + side : -GAP] == 255).all()
    assert (image[2 * GAP + side : -GAP, GAP : GAP + side] == 128).all()


def test_a_grid_keeps_colours_and_clips() -> None:
    image = grid(torch.tensor([2.0, -1.0, torch.nan]).view(1, 3, 1, 1).expand(1, 3, 100, 100))
    assert image[GAP, GAP].tolist() == [255, 0, 0] and image.shape == (100 + 2 * GAP, 100 + 2 * GAP, 3)


@pytest.mark.parametrize("shape", [(1, 28, 28), (2, 2, 8, 8), (0, 1, 8, 8)])
def test_what_is_no_image_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\[N, 1 or 3, H, W\]"):
        grid(torch.zeros(shape))


def test_a_png_reads_back_equal_and_is_the_same_again() -> None:
    reader = pytest.importorskip("matplotlib.image")
    image = grid(torch.rand(4, 3, 8, 8))
    content = png(image)
    back = (reader.imread(io.BytesIO(content), format="png")[..., :3] * 255).round().astype(np.uint8)
    assert np.array_equal(back, image) and png(image) == content


def test_a_run_draws_at_its_end_and_every_so_many_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = load(seed=0)
    monkeypatch.setattr(loop, "_load", lambda config: data)
    loop.run(RunConfig(**{**vars(CONFIG), "pictures_every": 4}), tmp_path, quiet=True)
    names = ("samples", "reconstructions")
    wanted = {f"{name}_{step:06d}.png" for name in names for step in (4, 8, 10)}
    assert {file.name for file in (tmp_path / "pictures").iterdir()} == wanted
    board = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = board.EventAccumulator(str(tmp_path / "tb")).Reload()
    assert {name: [image.step for image in events.Images(name)] for name in names} == {
        name: [4, 8, 10] for name in names
    }


def test_how_often_is_no_part_of_a_runs_identity_and_not_negative() -> None:
    assert differences(CONFIG, RunConfig(**{**vars(CONFIG), "pictures_every": 9})) == []
    with pytest.raises(UsageError, match="--pictures-every is -1; give a number of steps"):
        validate(RunConfig(**{**vars(CONFIG), "pictures_every": -1}))


def test_without_matplotlib_one_line_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with RunLogger(tmp_path, tensorboard=False) as log:
        for step in (1, 2):
            log.picture(step, "samples", grid(torch.rand(1, 1, 8, 8)))
    assert capsys.readouterr().err == "no pictures; to have them: pip install 'adaptive-loss[report]'\n"
    assert not (tmp_path / "pictures").exists()
