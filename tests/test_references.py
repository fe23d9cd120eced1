"""Tasks against plain scripts of their own: with the same fixed weights they learn as much, to 5%."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest

from adaptive_loss.data.base import Dataset
from adaptive_loss.data.digits import load
from adaptive_loss.tasks import _image_diffusion, tasks
from adaptive_loss.trainer import loop
from adaptive_loss.utils.config import RunConfig
from benchmarks.reference import classify, image_diffusion, image_gan, vae

SEEDS = [1, 2]
FEW = 520


@cache
def digits(subset: int = 1300) -> Dataset:
    return load(subset=subset)


def trained(task: str, seed: int, folder: Path, **settings: Any) -> dict[str, Any]:
    """A run with the customary weights, shorter than the quick form, whose figures are in the scripts' docstrings."""
    weights = dict(tasks.get(task).customary)
    config = RunConfig(task=task, dataset="digits", precision="fp32", seed=seed, weights=weights, **settings)
    return loop.run(config, folder, quiet=True)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_vae(seed: int, tmp_path: Path) -> None:
    mine = trained("vae", seed, tmp_path, epochs=8, lr=2e-3)
    assert mine["test_loss"] == pytest.approx(vae.train(digits(), seed, epochs=8), rel=0.05)
    assert mine["test_loss"] < 36  # 44.6 untrained


@pytest.mark.parametrize("seed", SEEDS)
def test_the_classifier(seed: int, tmp_path: Path) -> None:
    mine = trained("classify", seed, tmp_path, epochs=3)
    accuracy, loss = classify.train(digits(), seed, epochs=3)
    assert mine["test_accuracy"] == pytest.approx(accuracy, rel=0.05)
    assert mine["test_loss"] == pytest.approx(loss, rel=0.05)
    assert accuracy > 0.5  # by chance 0.1


@pytest.mark.parametrize("seed", SEEDS)
def test_the_image_gan(seed: int, tmp_path: Path) -> None:
    mine = trained("gan", seed, tmp_path, epochs=12, batch_size=64, subset=FEW)
    theirs, untrained = (image_gan.train(digits(FEW), seed, epochs, batch=64) for epochs in (12, 0))
    assert mine["test_own_kid"] == pytest.approx(theirs["own_kid"], rel=0.05)
    assert abs(theirs["own_kid"] - untrained["own_kid"]) > 0.3 * untrained["own_kid"]  # the two have gone a long way


@pytest.mark.parametrize(("task", "alignment"), [("diffusion", 0.0), ("diffusion_aligned", 0.5)])
@pytest.mark.parametrize("seed", SEEDS)
def test_diffusion_of_images(
    task: str, alignment: float, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_image_diffusion, "has_features", lambda dataset: False)  # samples take most of the time
    mine = trained(task, seed, tmp_path, epochs=3, batch_size=32, subset=FEW)
    theirs = image_diffusion.train(digits(FEW), seed, alignment, epochs=3)
    assert mine["test_loss"] == pytest.approx(theirs, rel=0.05)
    assert theirs < 0.95  # 1 untrained
