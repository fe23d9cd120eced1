"""The packaged digits: their splits, their values, and that a damaged file is noticed."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from adaptive_loss.data import datasets, digits
from adaptive_loss.data.base import Dataset
from adaptive_loss.errors import RunError, UsageError


def keys(*splits: str, dataset: Dataset) -> list[bytes]:
    images = torch.cat([getattr(dataset, split).images for split in splits])
    return [image.numpy().tobytes() for image in images]


def test_sizes_types_and_name() -> None:
    dataset = datasets.get("digits")()
    assert dataset.name == "digits" and dataset.classes == tuple("0123456789")
    assert [len(getattr(dataset, s)) for s in ("train", "probe", "select", "test")] == [1000, 150, 150, 497]
    assert dataset.image_shape == (1, 8, 8)
    assert dataset.provenance["licence"] == "CC BY 4.0"
    assert dataset.provenance["sha256"] == hashlib.sha256(digits.FILE.read_bytes()).hexdigest()


def test_values_use_the_whole_byte() -> None:
    images = digits.load().held_in.images
    assert set(images.unique().tolist()) == {round(v * 255 / 16) for v in range(17)}


def test_the_first_image_is_the_original_s_first_row() -> None:
    # Golden value: the first rows of the first image of optdigits.tes, scaled by 255/16.
    images, labels = digits._read()
    assert (images[0, 0, :2].float() * 16 / 255).round().int().tolist() == [
        [0, 0, 5, 13, 9, 1, 0, 0],
        [0, 0, 13, 15, 10, 15, 5, 0],
    ]
    assert labels[:10].tolist() == list(range(10))


def test_splits_are_balanced_and_partition_the_data() -> None:
    dataset = digits.load(seed=3)
    for split, each in ((dataset.train, 100), (dataset.probe, 15), (dataset.select, 15)):
        assert torch.bincount(split.labels).tolist() == [each] * 10
    everything = keys("train", "probe", "select", "test", dataset=dataset)
    assert sorted(everything) == sorted(image.numpy().tobytes() for image in digits._read()[0])
    assert torch.bincount(dataset.test.labels).min() >= 44


def test_the_seed_deals_the_held_in_images_and_never_the_test() -> None:
    first, again, other = digits.load(seed=1), digits.load(seed=1), digits.load(seed=2, subset=260)
    assert torch.equal(first.train.images, again.train.images)
    assert keys("train", dataset=first) != keys("train", dataset=other)
    assert torch.equal(first.test.images, other.test.images)
    assert [len(s) for s in (other.train, other.probe, other.select)] == [200, 30, 30]


@pytest.mark.parametrize(("subset", "part"), [(1301, "largest balanced size is 1300"), (9, "use 10 or more")])
def test_impossible_subsets(subset: int, part: str) -> None:
    with pytest.raises(UsageError, match=part):
        digits.load(subset=subset)


def test_a_damaged_or_missing_file_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "digits.npz"
    monkeypatch.setattr(digits, "FILE", copy)
    with pytest.raises(RunError, match=r"cannot read .*digits\.npz"):
        digits.load()
    data = bytearray(Path(digits.__file__).with_name("digits.npz").read_bytes())
    data[1000] ^= 1
    copy.write_bytes(data)
    with pytest.raises(RunError, match="is damaged") as caught:
        digits.load()
    assert "\n" not in str(caught.value)
