"""The image GAN: sizes, metrics, and a run on the digits."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from adaptive_loss.data.base import Dataset, Split
from adaptive_loss.data.digits import load
from adaptive_loss.metrics.frechet import frechet_distance
from adaptive_loss.seeding import own_generator
from adaptive_loss.tasks.gan import ImageGAN, resized
from adaptive_loss.trainer import loop
from adaptive_loss.utils.config import RunConfig

CONFIG = RunConfig(task="gan", dataset="digits", epochs=2, batch_size=100, subset=520, precision="fp32")
ROWS = torch.arange(16)


@cache
def digits() -> Dataset:
    return load(seed=0, subset=520)


def build() -> ImageGAN:
    torch.manual_seed(0)
    return ImageGAN(CONFIG, digits(), torch.device("cpu"))


def test_a_rim_comes_and_goes_without_a_trace() -> None:
    images = torch.rand(2, 1, 8, 8)
    padded = resized(images, 16)
    assert padded.shape == (2, 1, 16, 16) and float(padded.sum()) == pytest.approx(float(images.sum()), rel=1e-5)
    assert torch.equal(resized(padded, 8), images)


def test_what_is_scaled_keeps_its_mean() -> None:
    images = torch.rand(2, 1, 28, 28)
    small = resized(images, 16)
    assert small.shape == (2, 1, 16, 16) and resized(small, 28).shape == images.shape
    assert float(small.mean()) == pytest.approx(float(images.mean()), abs=0.01)


def test_the_critic_sees_16_by_16_from_minus_1_to_1() -> None:
    real = build().real(ROWS)
    assert real.shape == (16, 1, 16, 16) and float(real.min()) == -1 and float(real.max()) == 1
    assert (real[:, :, :4] == -1).all()


def test_the_probe_is_of_native_size_and_reaches_the_generator() -> None:
    task = build()
    torch.testing.assert_close(task.probe.data, task.splits["probe"].images.float() / 255)
    task.probe().backward()
    assert all(p.grad is not None and p.grad.any() for p in task.generator.parameters())


def test_terms_are_those_of_either_network() -> None:
    task = build()
    assert (*task.losses(ROWS), *task.opponent_losses("critic", ROWS)) == task.all_terms()


def test_evaluation_by_hand_and_an_untrained_generator_is_collapsed() -> None:
    task = build()
    found = task.evaluate("test")
    latents = torch.randn(497, 32, generator=own_generator(CONFIG.seed, "samples test"))
    with torch.no_grad():
        samples = task.judge(resized((task.averaged.module(latents) + 1) / 2, 8))
        images = task.judge(digits().test.images.float() / 255)
    assert found["own_frechet"] == pytest.approx(frechet_distance(samples, images), rel=1e-4)
    assert found["loss"] == found["own_kid"] and found == task.evaluate("test")
    assert found["coverage"] < 0.1 and found["collapsed"] == 1.0


def test_samples_that_are_data_are_not_collapsed() -> None:
    task = build()
    others = task._small(digits().train.images[:52])
    task.samples = lambda count, purpose: others  # type: ignore[method-assign]
    found = task.evaluate("select")
    assert found["coverage"] > 0.5 and found["collapsed"] == 0.0 and abs(found["loss"]) < 1


def test_images_of_28_pixels() -> None:
    images = torch.randint(0, 256, (40, 1, 28, 28), dtype=torch.uint8)
    split = Split(images, torch.arange(40) % 10)
    data = Dataset("fashion_mnist", tuple("0123456789"), split, split, split, split, {})
    task = ImageGAN(replace(CONFIG, dataset="fashion_mnist"), data, torch.device("cpu"))
    assert task.real(ROWS).shape == (16, 1, 16, 16) and task.pictures()["samples"].shape == (64, 1, 16, 16)
    assert torch.isfinite(task.probe()) and "own_frechet" not in task.evaluate("select")


def test_a_run_of_the_whole_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "_load", lambda config: digits())
    result = loop.run(replace(CONFIG, mode="full"), tmp_path, quiet=True)
    assert result["status"] == "ok" and result["steps"] == 8 and 0 <= result["test_coverage"] <= 1  # type: ignore[operator]
    assert (tmp_path / "pictures" / "samples_000008.png").is_file()
