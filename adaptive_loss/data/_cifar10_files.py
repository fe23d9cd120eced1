"""The files of CIFAR-10's binary version, from a folder or from an archive that may come from anyone.

A record is 3,073 bytes: the label (0 to 9), then the red, green and blue planes of a 32×32 image. There is no
pickle anywhere. An archive is read as a stream, never extracted as a whole: six exact names, regular files, capped.
"""

from __future__ import annotations

import gzip
import hashlib
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

import numpy as np
import torch
from torch import Tensor

from adaptive_loss.data._download import one_line
from adaptive_loss.errors import RunError

FOLDER = "cifar-10-batches-bin"
TRAIN_FILES = tuple(f"data_batch_{number}.bin" for number in range(1, 6))
TEST_FILE = "test_batch.bin"
FILES = (*TRAIN_FILES, TEST_FILE)
IMAGE_SHAPE = (3, 32, 32)
RECORD = 1 + 3 * 32 * 32
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

# The official files have 10,000 records; twice that leaves room for other cuts and none for a bomb.
MEMBER_CAP = 20_000 * RECORD
STREAM_CAP = len(FILES) * MEMBER_CAP + (1 << 20)
MEMBERS_CAP = 64
CHUNK = 1 << 20

Records = np.ndarray  # uint8 [records, 3073]


@dataclass(frozen=True)
class Cifar10Files:
    """The six files, checked.

    Attributes:
        records: uint8 ``[n, 3073]`` by file name; memory-mapped where they come from a folder.
        digests: SHA-256 by file name.
        archive_sha256: of the archive they were read from, if it was one.
    """

    records: dict[str, Records]
    digests: dict[str, str]
    archive_sha256: str | None = None

    @property
    def sha256(self) -> str:
        """One SHA-256 for the six, over lines ``digest  name``: the same for a folder and an archive of it."""
        return hashlib.sha256("".join(f"{self.digests[name]}  {name}\n" for name in FILES).encode()).hexdigest()

    def train_labels(self) -> Tensor:
        """int64 ``[n]``, the five training files one after the other."""
        labels = np.concatenate([self.records[name][:, 0] for name in TRAIN_FILES])
        return torch.from_numpy(labels.astype(np.int64))

    def train_images(self, indices: Tensor) -> Tensor:
        """uint8 ``[len(indices), 3, 32, 32]``: only these rows are read."""
        images = np.empty((len(indices), RECORD - 1), np.uint8)
        rows, start = indices.numpy(), 0
        for name in TRAIN_FILES:
            records = self.records[name]
            here = np.flatnonzero((rows >= start) & (rows < start + len(records)))
            images[here] = records[rows[here] - start, 1:]
            start += len(records)
        return torch.from_numpy(images).view(-1, *IMAGE_SHAPE)

    def test(self) -> tuple[Tensor, Tensor]:
        """Images and labels of the whole test file."""
        records = self.records[TEST_FILE]
        labels = torch.from_numpy(records[:, 0].astype(np.int64))
        return torch.from_numpy(np.array(records[:, 1:])).view(-1, *IMAGE_SHAPE), labels


def read_folder(folder: Path) -> Cifar10Files:
    """Map the six files of ``folder``; a missing or torn one raises :class:`RunError` that names it."""
    records: dict[str, Records] = {}
    for name in FILES:
        path = folder / name
        if not path.is_file():
            raise RunError(f"{path} is missing; put all of {FOLDER} there, or remove that folder to download it again")
        try:
            check_size(path.stat().st_size, str(path))
            records[name] = np.memmap(path, np.uint8, mode="r").reshape(-1, RECORD)
        except OSError as error:
            raise RunError(f"cannot read {path}: {one_line(error)}; check that you may read it") from error
        check_labels(records[name], str(path))
    return Cifar10Files(records, {name: _digest(records[name]) for name in FILES})


def read_archive(path: Path) -> Cifar10Files:
    """Read the six files out of a ``.tar.gz`` in memory, writing nothing (about 184 MB while it lasts)."""
    records: dict[str, Records] = {}
    digests: dict[str, str] = {}
    with path.open("rb") as file:
        source = _Hashing(file)
        for name, data in members(cast(IO[bytes], source), path):
            records[name] = np.frombuffer(data, np.uint8).reshape(-1, RECORD)
            digests[name] = hashlib.sha256(data).hexdigest()
    return Cifar10Files(records, digests, source.sha.hexdigest())


def check_size(size: int, where: str) -> None:
    """Whole records, one at least."""
    if not size:
        raise RunError(f"{where} is empty; get a whole copy of CIFAR-10's binary version")
    if size % RECORD:
        raise RunError(
            f"{where} has {size} bytes, which is no whole number of {RECORD}-byte records; "
            "get a whole copy of CIFAR-10's binary version"
        )


def check_labels(records: Records, where: str) -> None:
    """Labels 0 to 9; the first other one is named."""
    wrong = np.flatnonzero(records[:, 0] >= len(CLASSES))
    if len(wrong):
        first = int(wrong[0])
        raise RunError(
            f"{where}: record {first} has the label {int(records[first, 0])}, not 0 to 9; "
            "get a good copy of CIFAR-10's binary version"
        )


def members(file: IO[bytes], path: Path) -> Iterator[tuple[str, bytes]]:
    """Name and content of each of the six files in the archive, in its order, checked one by one.

    Args:
        file: the compressed bytes; read to their end, so that gzip's own checksum has its say.
        path: the archive's name, for messages.

    Raises:
        RunError: anything about the archive is not as it must be.
    """
    seen: set[str] = set()
    try:
        stream = cast(IO[bytes], _Capped(gzip.GzipFile(fileobj=file, mode="rb"), path))
        with tarfile.open(fileobj=stream, mode="r|", bufsize=CHUNK) as archive:
            for count, member in enumerate(archive, start=1):
                name = _wanted(member, count, seen, path)
                if name is not None:
                    yield name, _content(archive, member, name, path)
        while stream.read(CHUNK):
            pass
    except RunError:
        raise
    # A hostile header can make tarfile raise nearly anything; all of it means the same to the user.
    except (tarfile.TarError, OSError, EOFError, zlib.error, ValueError, ArithmeticError, RecursionError) as error:
        raise RunError(
            f"{path} is not a whole .tar.gz archive ({one_line(error)}); get a good copy of CIFAR-10's binary version"
        ) from error
    missing = [name for name in FILES if name not in seen]
    if missing:
        raise RunError(f"{path} has no member {FOLDER}/{missing[0]}; get a whole copy of CIFAR-10's binary version")


def _wanted(member: tarfile.TarInfo, count: int, seen: set[str], path: Path) -> str | None:
    """The file's short name if it is one of the six, None if it may be passed over; else refuse the archive."""
    fault = None
    folder, _, name = member.name.rpartition("/")
    wanted = folder == FOLDER and name in FILES
    if count > MEMBERS_CAP:
        fault = f"has more than {MEMBERS_CAP} members"
    elif member.name.startswith(("/", "\\")) or ".." in member.name.replace("\\", "/").split("/"):
        fault = f"has a member outside its folder, {member.name!r}"
    elif not (member.isreg() or (member.isdir() and not wanted)) or member.issparse():
        fault = f"has a member that is no plain file, {member.name!r}"
    elif wanted and name in seen:
        fault = f"has the member {member.name!r} twice"
    elif not 0 <= member.size <= MEMBER_CAP:
        fault = f"has a member of {member.size} bytes, {member.name!r}; {MEMBER_CAP} at most are read"
    if fault:
        raise RunError(f"{path} {fault}; it is not CIFAR-10's binary version and was not used")
    if not wanted:
        return None
    seen.add(name)
    return name


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo, name: str, path: Path) -> bytes:
    where = f"{path}, member {name},"
    check_size(member.size, where)
    file = archive.extractfile(member)
    data = file.read() if file else b""
    if len(data) != member.size:
        raise RunError(f"{where} ends after {len(data)} of {member.size} bytes; get a whole copy")
    check_labels(np.frombuffer(data, np.uint8).reshape(-1, RECORD), f"{path}, member {name}")
    return data


def _digest(records: Records) -> str:
    flat, sha = records.reshape(-1), hashlib.sha256()
    for start in range(0, len(flat), CHUNK):
        sha.update(flat[start : start + CHUNK].data)
    return sha.hexdigest()


class _Hashing:
    """A file that takes the SHA-256 of what is read from it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.sha = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self.sha.update(data)
        return data


class _Capped:
    """A decompressed stream that ends in an error before a bomb fills the memory."""

    def __init__(self, file: gzip.GzipFile, path: Path) -> None:
        self._file, self._path = file, path
        self._left = STREAM_CAP

    def read(self, size: int) -> bytes:
        data = self._file.read(min(size, self._left + 1))
        self._left -= len(data)
        if self._left < 0:
            raise RunError(f"{self._path} unpacks to more than {STREAM_CAP} bytes; it was not used")
        return data
