"""Flips, crops and normalisation against plain references, and their laws."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Literal

import pytest
import torch
import torch.nn.functional as F

from adaptive_loss.data.augment import augmenter, none, normalise, standard
from adaptive_loss.errors import UsageError


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors gain nothing from more, and lose much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some_images(batch: int = 16, channels: int = 3, height: int = 9, width: int = 7) -> torch.Tensor:
    return torch.randint(1, 256, (batch, channels, height, width), generator=seeded(5), dtype=torch.uint8)


def candidates(image: torch.Tensor, pad: int, border: str, flip: bool) -> set[bytes]:
    """Every crop of the padded image and of its mirror image, built the slow way."""
    height, width = image.shape[1:]
    mode = "reflect" if border == "reflect" else "constant"
    frames = [image] + ([image.flip(2)] if flip else [])
    found = set()
    for frame in frames:
        padded = F.pad(frame.float()[None], (pad,) * 4, mode=mode)[0].byte() if pad else frame
        for top in range(2 * pad + 1):
            for left in range(2 * pad + 1):
                found.add(padded[:, top : top + height, left : left + width].contiguous().numpy().tobytes())
    return found


@pytest.mark.parametrize("border", ["reflect", "zero"])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("pad", [0, 1, 3])
def test_each_result_is_a_crop_of_the_padded_image(border: str, flip: bool, pad: int) -> None:
    images = some_images()
    moved = standard(images, seeded(1), flip=flip, pad=pad, border=border)  # pyright: ignore[reportArgumentType]
    assert moved.dtype == torch.uint8 and moved.shape == images.shape
    for image, result in zip(images, moved, strict=True):
        assert result.contiguous().numpy().tobytes() in candidates(image, pad, border, flip)


def test_all_crops_and_both_sides_occur_about_equally_often() -> None:
    image = some_images(1, 1, 6, 6)
    moved = standard(image.expand(3600, -1, -1, -1), seeded(), flip=True, pad=1)
    _, counts = moved.flatten(1).unique(dim=0, return_counts=True)
    assert len(counts) == 18
    assert counts.min() > 140 and counts.max() < 260  # 200 expected, standard deviation 14


def test_no_flip_and_no_pad_changes_nothing() -> None:
    images = some_images()
    assert torch.equal(standard(images, seeded(), flip=False, pad=0), images)
    assert none(images, seeded()) is images


def test_channels_of_an_image_move_together() -> None:
    images = some_images(channels=1).repeat(1, 3, 1, 1)
    moved = standard(images, seeded(), flip=True, pad=2)
    assert torch.equal(moved[:, 0], moved[:, 1]) and torch.equal(moved[:, 0], moved[:, 2])


def test_seeded_by_its_own_generator_only() -> None:
    images, before = some_images(), torch.get_rng_state()
    first, again, other = (standard(images, seeded(seed), flip=True, pad=2) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(before, torch.get_rng_state())


def test_switching_the_flip_leaves_generator_and_crops_as_they_were() -> None:
    images = some_images(batch=64, width=9)
    symmetric = torch.maximum(images, images.flip(3))
    with_flip, without = seeded(4), seeded(4)
    standard(images, with_flip, flip=True, pad=2)
    standard(images, without, flip=False, pad=2)
    assert torch.equal(with_flip.get_state(), without.get_state())
    rows = standard(symmetric, seeded(4), flip=True, pad=2), standard(symmetric, seeded(4), flip=False, pad=2)
    same = sum(torch.equal(a, b) for a, b in zip(*rows, strict=True))
    assert same >= 24  # those not mirrored, at least


def test_input_is_not_changed_and_may_be_of_any_layout() -> None:
    images = some_images()
    kept = images.clone()
    plain = standard(images, seeded(), flip=True, pad=2)
    assert torch.equal(images, kept)
    strided = images.contiguous(memory_format=torch.channels_last)
    assert torch.equal(plain, standard(strided, seeded(), flip=True, pad=2))
    assert standard(images[:0], seeded(), flip=True, pad=2).shape == (0, 3, 9, 7)


@pytest.mark.parametrize("border", ["reflect", "zero"])
def test_images_stay_on_their_device(border: Literal["reflect", "zero"]) -> None:
    # No operation takes a tensor on the meta device and one on the CPU, as none takes one on a CUDA device and one.
    moved = standard(some_images().to("meta"), seeded(), flip=True, pad=2, border=border)
    assert moved.device.type == "meta" and moved.shape == some_images().shape


@pytest.mark.parametrize("pad", [-1, 7])
def test_a_pad_that_cannot_be(pad: int) -> None:
    with pytest.raises(ValueError, match="pad must be from 0 to 6"):
        standard(some_images(), seeded(), flip=False, pad=pad)


@pytest.mark.parametrize("channels", [1, 3])
def test_normalise_is_the_formula(channels: int) -> None:
    images = some_images(channels=channels)
    kept = images.clone()
    mean, std = torch.linspace(0.2, 0.5, channels), torch.linspace(0.1, 0.3, channels)
    result = normalise(images, mean, std)
    expected = (images.double() / 255 - mean.double().view(-1, 1, 1)) / std.double().view(-1, 1, 1)
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-5)
    assert result.dtype == torch.float32 and torch.equal(images, kept)
    assert result.is_contiguous(memory_format=torch.channels_last if channels == 3 else torch.contiguous_format)


def test_normalised_images_have_mean_0_and_spread_1() -> None:
    from adaptive_loss.data.base import channel_statistics

    images = some_images(batch=50)
    result = normalise(images, *channel_statistics(images))
    torch.testing.assert_close(result.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(result.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-5, rtol=0)


def test_the_selector_suits_the_dataset() -> None:
    gradient = torch.arange(32, dtype=torch.uint8).expand(64, 3, 32, 32)
    mirrored = augmenter("standard", "cifar10")(gradient, seeded())
    assert (mirrored[:, 0, 16, 10] > mirrored[:, 0, 16, 20]).any()
    digit = torch.arange(1, 9, dtype=torch.uint8).expand(64, 1, 8, 8)
    for dataset in ("digits", "mine"):
        moved = augmenter("standard", dataset)(digit, seeded())
        assert (moved[:, 0, 4, 3] < moved[:, 0, 4, 5]).all()
        assert (moved[:, 0, 4, 3] - 4).to(torch.int8).abs().max() <= 1
    assert augmenter("none", "digits") is none
    with pytest.raises(UsageError, match="unknown --augment 'mixup'; choose from: none, standard"):
        augmenter("mixup", "cifar10")


def test_a_batch_takes_a_few_milliseconds_of_one_core() -> None:
    images = some_images(128, 3, 32, 32)
    generator, best = seeded(), float("inf")
    for _ in range(20):
        start = time.process_time()
        standard(images, generator, flip=True, pad=4)
        best = min(best, time.process_time() - start)
    assert best < 0.005
