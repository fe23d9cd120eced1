"""Fashion-MNIST (Xiao et al., 2017) from its official IDX files: found on disk, or downloaded once and checked.

An IDX file is a big-endian header (magic number, then each dimension) and the bytes themselves, here under gzip. A
file may come from anyone: it is read as a stream, never more of it than its header may announce.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from adaptive_loss.data import datasets
from adaptive_loss.data._download import LIMIT_SECONDS, Remote, fetch, one_line
from adaptive_loss.data.base import Dataset, Split, split_sizes, stratified_splits
from adaptive_loss.errors import RunError, UsageError
from adaptive_loss.locks import file_lock
from adaptive_loss.seeding import own_generator

URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"  # this address has no HTTPS; the hashes decide
FOLDER = "fashion-mnist"
TIMEOUT_SECONDS = 30.0
CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
SIDE = 28
MOST_IMAGES = 120_000  # the official training file has 60,000; twice that leaves no room for a bomb
PUBLISHED = {
    "train-images-idx3-ubyte.gz": (
        26_421_880,
        "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
    ),
    "train-labels-idx1-ubyte.gz": (29_515, "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845"),
    "t10k-images-idx3-ubyte.gz": (4_422_102, "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073"),
    "t10k-labels-idx1-ubyte.gz": (5_148, "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5"),
}
"""Size in bytes and SHA-256 of each file as published."""
TRAIN, TEST = "train", "t10k"


@datasets.register("fashion_mnist")
def load(data_dir: str | Path = "data", *, seed: int = 0, subset: int = 5000) -> Dataset:
    """Fashion-MNIST with ``subset`` training images split 80 / 10 / 10 % and the whole official test set.

    Args:
        data_dir: the folder of the four ``.gz`` files, or one that has them in ``fashion-mnist``. Those that are
            missing are downloaded.
        seed: chooses which images, and their splits.
        subset: images held in, balanced over the classes; 60,000 for all.

    Raises:
        UsageError: the subset is too small or too large, or ``data_dir`` is a file.
        RunError: the download failed, or a file is torn or not Fashion-MNIST.

    Example:
        >>> dataset = load("data", seed=1)  # doctest: +SKIP
        >>> len(dataset.train), len(dataset.probe), len(dataset.test)  # doctest: +SKIP
        (4000, 500, 10000)
    """
    sizes = split_sizes(subset)
    folder = _find(Path(data_dir).expanduser())
    train, test = _read_pair(folder, TRAIN), _read_pair(folder, TEST)
    generator = own_generator(seed, "fashion_mnist split")
    chosen = stratified_splits(train.data.labels, sizes, generator, classes=CLASSES)
    splits = {name: Split(train.data.images[rows], train.data.labels[rows]) for name, rows in chosen.items()}
    digests = train.digests | test.digests
    return Dataset("fashion_mnist", CLASSES, **splits, test=test.data, provenance=_provenance(digests))


@dataclass(frozen=True)
class _Pair:
    """Images and labels of one half, and the SHA-256 of each file's content by file name."""

    data: Split
    digests: dict[str, str]


def _provenance(digests: dict[str, str]) -> dict[str, object]:
    lines = "".join(f"{digest}  {name}\n" for name, digest in digests.items())
    return {
        "name": "fashion_mnist",
        "source": f"Fashion-MNIST, {URL} (H. Xiao, K. Rasul and R. Vollgraf, 2017)",
        "licence": "MIT",
        "sha256": hashlib.sha256(lines.encode()).hexdigest(),
        "files": digests,  # of the unpacked bytes, which do not depend on how they were packed
    }


def _find(data_dir: Path) -> Path:
    """The folder with the four files; those that are not there are downloaded, once for all processes that ask."""
    if data_dir.is_file():
        raise UsageError(f"--data-dir {data_dir} is a file; name the folder of Fashion-MNIST's four .gz files")
    folder = data_dir if any((data_dir / name).exists() for name in PUBLISHED) else data_dir / FOLDER
    if all((folder / name).exists() for name in PUBLISHED):
        return folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with file_lock(folder / ".fashion_mnist.lock", f"waiting for another process that prepares {folder}"):
            for name, (size, sha256) in PUBLISHED.items():
                if not (folder / name).exists():
                    by_hand = f"fetch it by hand into {folder}"
                    remote = Remote(URL + name, size, sha256, by_hand)
                    fetch(remote, folder / name, timeout=TIMEOUT_SECONDS, limit=LIMIT_SECONDS)
    except OSError as error:
        raise RunError(f"--data-dir {data_dir}: {one_line(error)}; name a folder you may write to") from error
    return folder


def _read_pair(folder: Path, half: str) -> _Pair:
    names = f"{half}-images-idx3-ubyte.gz", f"{half}-labels-idx1-ubyte.gz"
    images, labels = read_idx(folder / names[0], 3), read_idx(folder / names[1], 1)
    if len(images) != len(labels):
        counts = f"{len(images)} images but {len(labels)} labels in {names[1]}"
        raise RunError(f"{folder / names[0]} has {counts}; get both anew")
    if labels.max() >= len(CLASSES):
        first = int((labels >= len(CLASSES)).argmax())
        where = f"{folder / names[1]}: record {first}"
        raise RunError(f"{where} has the label {labels[first]}, not 0 to 9; get a good copy")
    digests = {name: hashlib.sha256(part.data).hexdigest() for name, part in zip(names, (images, labels), strict=True)}
    data = Split(torch.from_numpy(images)[:, None], torch.from_numpy(labels.astype(np.int64)))
    return _Pair(data, digests)


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The bytes of a gzipped IDX file: uint8 ``[n, 28, 28]`` for 3 dimensions, ``[n]`` for 1.

    Raises:
        RunError: the file is torn, is no such file, or announces more than is read.
    """
    try:
        with gzip.open(path) as file:
            shape = _shape(file.read(4 + 4 * dimensions), dimensions, path)
            data = bytearray(file.read(math.prod(shape)))
            if len(data) < math.prod(shape):
                raise RunError(f"{path} ends after {len(data)} of {math.prod(shape)} bytes; get a whole copy")
            if file.read(1):  # reading to the end lets gzip check its own sum, too
                raise RunError(f"{path} is longer than its header says; get a good copy of Fashion-MNIST")
    except (OSError, EOFError, zlib.error) as error:
        raise RunError(f"cannot read {path} ({one_line(error)}); get a good copy of Fashion-MNIST") from error
    return np.frombuffer(data, np.uint8).reshape(shape)


def _shape(header: bytes, dimensions: int, path: Path) -> tuple[int, ...]:
    """The announced shape, checked before anything is read by it. 0x08 in the magic number means unsigned bytes."""
    if len(header) < 4 + 4 * dimensions or header[:4] != bytes([0, 0, 8, dimensions]):
        raise RunError(f"{path} is no IDX file of bytes in {dimensions} dimensions; get a good copy of Fashion-MNIST")
    shape = struct.unpack(f">{dimensions}I", header[4:])
    if shape[1:] not in ((), (SIDE, SIDE)):
        raise RunError(f"{path} holds images of {shape[1]}×{shape[2]} pixels, not {SIDE}×{SIDE}; it was not used")
    if not 0 < shape[0] <= MOST_IMAGES:
        raise RunError(f"{path} announces {shape[0]} records; 1 to {MOST_IMAGES} are read; it was not used")
    return shape
