"""Handwritten digits, 8×8 (Alpaydin & Kaynak, 1998): shipped inside the package, so it works with no network."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from adaptive_loss.data import datasets
from adaptive_loss.data.base import SMALLEST_SUBSET, Dataset, Split, stratified_splits
from adaptive_loss.errors import RunError, UsageError
from adaptive_loss.seeding import own_generator

FILE = Path(__file__).with_name("digits.npz")
SHA256 = "b2dab7b501728c22e9119ad76740b2e17c77a231e42d1e592380d90886f1a05e"
CLASSES = tuple("0123456789")
HELD_IN = 1300


@datasets.register("digits")
def load(data_dir: str | Path | None = None, *, seed: int = 0, subset: int = HELD_IN) -> Dataset:
    """1,797 digits: train 1,000, probe 150, select 150, and 497 for the test.

    The test images are the same for every seed and subset, so results can be compared; the seed deals the rest.

    Args:
        data_dir: not used; the images come with the package.
        seed: deals the held-in images to their splits.
        subset: images held in, at most 1,300; a smaller one keeps the proportions.

    Raises:
        UsageError: the subset is too small or too large.
        RunError: the packaged file is damaged.

    Example:
        >>> dataset = load(seed=1)
        >>> len(dataset.train), len(dataset.probe), len(dataset.select), len(dataset.test)
        (1000, 150, 150, 497)
    """
    del data_dir
    if subset < SMALLEST_SUBSET:
        raise UsageError(f"--subset {subset} is too small to split; use {SMALLEST_SUBSET} or more")
    images, labels = _read()
    pool, rest = _held_in(labels)
    held_out = round(subset * 150 / HELD_IN)
    sizes = {"train": subset - 2 * held_out, "probe": held_out, "select": held_out}
    dealt = stratified_splits(labels[pool], sizes, own_generator(seed, "digits split"), classes=CLASSES)
    splits = {name: Split(images[pool[rows]], labels[pool[rows]]) for name, rows in dealt.items()}
    return Dataset("digits", CLASSES, **splits, test=Split(images[rest], labels[rest]), provenance=_provenance())


def _held_in(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Indices held in (130 of each class) and the 497 of the test; no run's seed has a say in it."""
    pool = stratified_splits(labels, {"pool": HELD_IN}, own_generator(0, "digits test"))["pool"]
    is_test = torch.ones(len(labels), dtype=torch.bool)
    is_test[pool] = False
    return pool, torch.nonzero(is_test).flatten()


def _read() -> tuple[Tensor, Tensor]:
    """uint8 images ``[1797, 1, 8, 8]``, 0 to 255, and int64 labels; the file's hash is checked before it is parsed."""
    try:
        data = FILE.read_bytes()
    except OSError as error:
        raise RunError(f"cannot read {FILE} ({error.strerror}); reinstall the package") from error
    if hashlib.sha256(data).hexdigest() != SHA256:
        raise RunError(f"{FILE} is damaged: its SHA-256 is not the expected one; reinstall the package")
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        images, labels = torch.from_numpy(arrays["images"]), torch.from_numpy(arrays["labels"])
    scaled = (images.float() * (255 / 16)).round().to(torch.uint8)
    return scaled[:, None], labels.long()


def _provenance() -> dict[str, object]:
    return {
        "name": "digits",
        "source": "UCI Machine Learning Repository, Optical Recognition of Handwritten Digits, test part "
        "(E. Alpaydin and C. Kaynak, 1998), doi:10.24432/C50P49",
        "licence": "CC BY 4.0",
        "sha256": SHA256,
    }
