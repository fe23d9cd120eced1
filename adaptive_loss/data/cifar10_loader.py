"""CIFAR-10 (Krizhevsky, 2009) from its binary version: found on disk, or downloaded once and checked."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from adaptive_loss.data import _cifar10_files as files
from adaptive_loss.data import datasets
from adaptive_loss.data._download import CHUNK, LIMIT_SECONDS, Remote, fetch, one_line
from adaptive_loss.data.augment import Augment, augmenter, none, normalise
from adaptive_loss.data.base import Batches, Dataset, Split, split_sizes, stratified_splits
from adaptive_loss.errors import RunError, UsageError
from adaptive_loss.files import sync_folder
from adaptive_loss.locks import file_lock
from adaptive_loss.seeding import own_generator

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
SIZE = 170_052_171
SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
ARCHIVE = "cifar-10-binary.tar.gz"
TIMEOUT_SECONDS = 30.0


@datasets.register("cifar10_loader")
def load(data_dir: str | Path = "data", *, seed: int = 0, subset: int = 5000) -> Dataset:
    """CIFAR-10 with ``subset`` training images split 80 / 10 / 10 % and the whole official test set.

    Args:
        data_dir: the folder ``cifar-10-batches-bin``, a folder that holds it, or a ``.tar.gz`` archive of it, which
            is read in place. Where a folder holds nothing, the official archive is downloaded into it.
        seed: chooses which images, and their splits.
        subset: images held in, balanced over the classes; 50,000 for all.

    Raises:
        UsageError: the subset is too small or too large, or ``data_dir`` names a file that is not there.
        RunError: the download failed, or a file is missing, torn or not CIFAR-10.

    Example:
        >>> dataset = load("data", seed=1)  # doctest: +SKIP
        >>> len(dataset.train), len(dataset.probe), len(dataset.test)  # doctest: +SKIP
        (4000, 500, 10000)
    """
    sizes = split_sizes(subset)
    source = _find(Path(data_dir).expanduser())
    labels = source.train_labels()
    chosen = stratified_splits(labels, sizes, own_generator(seed, "cifar10 split"), classes=files.CLASSES)
    splits = {name: Split(source.train_images(rows), labels[rows]) for name, rows in chosen.items()}
    return Dataset("cifar10", files.CLASSES, **splits, test=Split(*source.test()), provenance=_provenance(source))


def _provenance(source: files.Cifar10Files) -> dict[str, object]:
    return {
        "name": "cifar10",
        "source": f"CIFAR-10, binary version, {URL} (A. Krizhevsky, 2009)",
        "licence": "none stated by its authors, who ask to cite Krizhevsky (2009); not redistributed here",
        "sha256": source.sha256,
        "files": dict(source.digests),
        "archive_sha256": source.archive_sha256,
    }


def _find(data_dir: Path) -> files.Cifar10Files:
    """Read what ``data_dir`` names; what is not there is downloaded first."""
    try:
        if data_dir.is_file():
            return files.read_archive(data_dir)
        if data_dir.name.endswith((".tar.gz", ".tgz")) and not data_dir.exists():
            raise UsageError(f"--data-dir {data_dir}: there is no such archive; check the path, or name a folder")
        root = data_dir.parent if data_dir.name == files.FOLDER else data_dir
        folder, archive = root / files.FOLDER, root / ARCHIVE
        if any((data_dir / name).exists() for name in files.FILES):
            return files.read_folder(data_dir)
        if not folder.is_dir() and archive.is_file() and not _ours(archive):
            return files.read_archive(archive)
        if not folder.is_dir():
            _download(root)
        return files.read_folder(folder)
    except OSError as error:
        raise RunError(f"--data-dir {data_dir}: {one_line(error)}; name a folder you may write to") from error


def _ours(archive: Path) -> bool:
    """Whether it is the official archive, and unpacking it beside itself is possible."""
    if archive.stat().st_size != SIZE or not os.access(archive.parent, os.W_OK):
        return False
    sha = hashlib.sha256()
    with archive.open("rb") as file:
        while chunk := file.read(CHUNK):
            sha.update(chunk)
    return sha.hexdigest() == SHA256


def _download(root: Path) -> None:
    """Get the archive if it is not there and unpack it, once for all processes that ask at the same time."""
    root.mkdir(parents=True, exist_ok=True)
    folder, archive = root / files.FOLDER, root / ARCHIVE
    by_hand = f"fetch it by hand and pass --data-dir PATH, where PATH is that archive or its folder {files.FOLDER}"
    with file_lock(root / f".{ARCHIVE}.lock", f"waiting for another process that prepares {folder}"):
        if folder.is_dir():
            return
        if not archive.is_file():
            fetch(Remote(URL, SIZE, SHA256, by_hand), archive, timeout=TIMEOUT_SECONDS, limit=LIMIT_SECONDS)
        _unpack(archive, folder)


def _unpack(archive: Path, folder: Path) -> None:
    """Write the six checked files into a temporary folder, and give it its name when they are all on disk."""
    part = folder.with_name(f".{folder.name}.part")
    if part.exists():
        shutil.rmtree(part)
    part.mkdir()
    try:
        with archive.open("rb") as packed:
            for name, data in files.members(packed, archive):
                with (part / name).open("xb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
        sync_folder(part)
        os.rename(part, folder)
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


class Loader:
    """Normalised batches of a split, as often as it is looped over.

    Args:
        split: the images and labels.
        dataset: gives the mean and standard deviation.
        order: index tensors, one a batch: a :class:`Batches` or a plain sequence.
        augment: applied to each batch of bytes.
        seed: of the augmentation's own generator.
    """

    def __init__(
        self, split: Split, dataset: Dataset, order: Batches | Sequence[Tensor], augment: Augment = none, seed: int = 0
    ) -> None:
        self.split, self.dataset, self.order, self.augment = split, dataset, order, augment
        self.generator = own_generator(seed, "augment")

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for index in self.order:
            images = self.augment(self.split.images[index], self.generator)
            yield normalise(images, self.dataset.mean, self.dataset.std), self.split.labels[index]


def get_cifar10_loaders(
    batch_size: int = 128, data_dir: str | Path = "data", subset: int = 5000, seed: int = 42
) -> tuple[Loader, Loader, Loader]:
    """Training, validation and test batches of (normalised float images ``[B, 3, 32, 32]``, labels ``[B]``).

    Training batches are shuffled and augmented (flip, crop); validation is the probe and select splits together.

    Args:
        batch_size: images a batch; the last batch of a loop may be smaller.
        data_dir, subset, seed: as for :func:`load`.

    Raises:
        UsageError, RunError: as :func:`load`; ``batch_size`` below 1.
    """
    dataset = load(data_dir, seed=seed, subset=subset)
    order = Batches(len(dataset.train), min(batch_size, len(dataset.train)), own_generator(seed, "order"), False)
    held_out = Split(
        torch.cat([dataset.probe.images, dataset.select.images]),
        torch.cat([dataset.probe.labels, dataset.select.labels]),
    )
    train = Loader(dataset.train, dataset, order, augmenter("standard", dataset.name), seed)
    validation, test = (
        Loader(split, dataset, torch.arange(len(split)).split(batch_size)) for split in (held_out, dataset.test)
    )
    return train, validation, test
