"""Dataset download: corruptions, hostile archives and eight processes at once, against a server on this machine."""

from __future__ import annotations

import hashlib
import os
import random
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from unittest import mock

from adaptive_loss.data import _cifar10_files as files
from adaptive_loss.data import cifar10_loader as cifar
from adaptive_loss.errors import RunError
from tests.cifar_archives import ARCHIVE, GOOD, HOSTILE, RECORDS, Server, packed
from tests.reliability.rows import Row
from tests.reliability.stub_study import ended, forked

PROCESSES = 8


def torture(corruptions: int = 50, times: int = 10) -> list[Row]:
    """50 corruptions, every hostile archive, and ten times eight processes."""
    with open(os.devnull, "w") as nothing, mock.patch.object(sys, "stderr", nothing):
        return [corrupted(corruptions), hostile(), together(times)]


def corrupted(number: int) -> Row:
    """Downloads of archives with a flipped bit, a missing end or bytes too many; none may be used or left."""
    dice, accepted = random.Random(0), 0
    with served() as server, tempfile.TemporaryDirectory() as root:
        for trial in range(number):
            server.body = _corrupt(dice, trial)
            # What is longer than announced is cut off by the client, and what is left of it is the right archive.
            honest = trial % 2 or len(server.body) > len(ARCHIVE)
            server.announce = len(server.body) if honest else len(ARCHIVE)
            accepted += _used(Path(root)) or _left(Path(root)) != []
    return Row("dataset download: a corrupted archive is not accepted", number, accepted)


def hostile() -> Row:
    """Archives that match size and SHA-256 and hold paths, links, devices and bombs; nothing is written outside."""
    faults = []
    with mock.patch.multiple(files, MEMBER_CAP=files.RECORD * RECORDS * 2, STREAM_CAP=3_500_000):
        for name, (edit, _) in HOSTILE.items():
            with served(packed(GOOD, edit)), tempfile.TemporaryDirectory() as root:
                data = Path(root, "inner", "data")
                used = _used(data)
                if used or _outside(Path(root), data) or (data / files.FOLDER).exists():
                    faults.append(name)
    return Row(
        "dataset download: a hostile archive writes nothing outside", len(HOSTILE), len(faults), ", ".join(faults)
    )


def together(times: int) -> Row:
    """Eight processes that need the data at once: one request, and all of them have it."""
    faults = 0
    for _ in range(times):
        with served() as server, tempfile.TemporaryDirectory() as root:
            server.pause = 0.2
            work = partial(_fetch, Path(root, "data"))
            processes = [forked(work, Path(root, f"said_{number}.txt")) for number in range(PROCESSES)]
            codes = [ended(process) for process in processes]
            there = {file.name: file.read_bytes() for file in (Path(root) / "data" / files.FOLDER).iterdir()}
            faults += codes != [0] * PROCESSES or server.requests != 1 or there != GOOD
    return Row("dataset download: 8 processes at once download it once", times * PROCESSES, faults)


@contextmanager
def served(archive: bytes = ARCHIVE) -> Iterator[Server]:
    """A server on this machine in the place of the official one, with the size and SHA-256 of ``archive``."""
    server = Server()
    server.body, server.announce = archive, len(archive)
    official = {"URL": server.url, "SIZE": len(archive), "SHA256": hashlib.sha256(archive).hexdigest()}
    with mock.patch.multiple(cifar, **official), mock.patch.dict(os.environ, no_proxy="127.0.0.1"):
        try:
            yield server
        finally:
            server.http.shutdown()
            server.http.server_close()


def _corrupt(dice: random.Random, trial: int) -> bytes:
    body = bytearray(ARCHIVE)
    place = dice.randrange(len(body))
    if trial % 5 == 3:
        return bytes(body[:place])
    if trial % 5 == 4:
        return bytes(body) + dice.randbytes(1 + place % 1000)
    body[place] ^= 1 << dice.randrange(8)
    return bytes(body)


def _fetch(data: Path) -> int:
    cifar.load(data, subset=100)
    return 0


def _used(data: Path) -> bool:
    try:
        return _fetch(data) == 0
    except RunError:
        return False


def _left(root: Path) -> list[str]:
    return [file.name for file in root.rglob("*") if not file.name.endswith(".lock")]


def _outside(root: Path, data: Path) -> list[Path]:
    return [file for file in root.rglob("*") if data not in (file, *file.parents) and file not in data.parents]
