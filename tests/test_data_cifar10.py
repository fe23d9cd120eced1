"""CIFAR-10's files: read, downloaded once, and refused in one line when anything about them is wrong."""

from __future__ import annotations

import gzip
import hashlib
import multiprocessing
import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from adaptive_loss.data import _cifar10_files as files
from adaptive_loss.data import cifar10_loader as cifar
from adaptive_loss.data import datasets
from adaptive_loss.data.base import Dataset
from adaptive_loss.errors import RunError, UsageError
from tests.cifar_archives import ARCHIVE, GOOD, HOSTILE, RECORDS, Server, contents, packed


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors gain nothing from more, and lose much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "data" / files.FOLDER
    path.mkdir(parents=True)
    for name, content in GOOD.items():
        (path / name).write_bytes(content)
    return path


def small(data_dir: Path, seed: int = 0) -> Dataset:
    return cifar.load(data_dir, seed=seed, subset=100)


def one_line(call: Callable[[], object], *parts: str, error: type[Exception] = RunError) -> str:
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message
    return message


def tree(path: Path) -> dict[str, bytes]:
    return {str(f.relative_to(path)): f.read_bytes() if f.is_file() else b"" for f in sorted(path.rglob("*"))}


# --- reading and splitting


def test_registered_under_both_names() -> None:
    assert datasets.get("cifar10") is datasets.get("cifar10_loader") is cifar.load


def test_folder_parent_and_archive_give_the_same_data(folder: Path, tmp_path: Path) -> None:
    archive = tmp_path / "mine.tgz"
    archive.write_bytes(ARCHIVE)
    first, *others = (small(path) for path in (folder, folder.parent, archive))
    assert first.name == "cifar10" and first.classes[3] == "cat"
    assert [len(getattr(first, s)) for s in ("train", "probe", "select", "test")] == [80, 10, 10, RECORDS]
    for other in others:
        assert torch.equal(first.held_in.images, other.held_in.images)
        assert torch.equal(first.test.images, other.test.images)
        assert first.provenance["sha256"] == other.provenance["sha256"]
    assert others[1].provenance["archive_sha256"] == hashlib.sha256(ARCHIVE).hexdigest()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "mine.tgz"]


def test_images_are_the_records_planes(folder: Path) -> None:
    dataset = small(folder)
    raw = {content[i + 1 : i + files.RECORD]: content[i]
           for content in GOOD.values() for i in range(0, len(content), files.RECORD)}  # fmt: skip
    for split in (dataset.train, dataset.probe, dataset.select, dataset.test):
        for image, label in zip(split.images, split.labels, strict=True):
            assert raw[image.numpy().tobytes()] == label
    first = np.frombuffer(GOOD[files.TEST_FILE], np.uint8)[1 : files.RECORD].reshape(3, 32, 32)
    assert (dataset.test.images[0].numpy() == first).all()


def test_splits_are_balanced_disjoint_and_seeded(folder: Path) -> None:
    first, again, other = small(folder, 1), small(folder, 1), small(folder, 2)
    assert torch.bincount(first.train.labels).tolist() == [8] * 10
    assert torch.bincount(first.probe.labels).tolist() == torch.bincount(first.select.labels).tolist() == [1] * 10
    held_in = [image.numpy().tobytes() for image in first.held_in.images]
    assert len(set(held_in)) == 100
    assert not set(held_in) & {image.numpy().tobytes() for image in first.test.images}
    assert torch.equal(first.held_in.images, again.held_in.images)
    assert not torch.equal(first.train.images, other.train.images)
    assert torch.equal(first.test.images, other.test.images)


def test_files_may_have_any_number_of_records(folder: Path) -> None:
    (folder / files.TRAIN_FILES[1]).write_bytes(contents(9, 7)[files.TRAIN_FILES[1]])
    assert len(cifar._find(folder).train_labels()) == 4 * RECORDS + 7
    assert len(small(folder).train) == 80


def test_impossible_subsets(folder: Path) -> None:
    one_line(lambda: cifar.load(folder, subset=9), "--subset 9", "10 or more", error=UsageError)
    message = one_line(lambda: cifar.load(folder, subset=5000), error=UsageError)
    assert message == (
        "--subset 5000 needs 500 images of each class but class 'airplane' has 30; the largest balanced size is 300"
    )
    assert len(cifar.load(folder, subset=300).held_in) == 300


@pytest.mark.parametrize("name", files.FILES)
def test_a_folder_without_one_of_the_six(folder: Path, name: str) -> None:
    (folder / name).unlink()
    one_line(lambda: small(folder), str(folder / name), "is missing")
    one_line(lambda: small(folder.parent), str(folder / name), "is missing")


@pytest.mark.parametrize(
    ("spoil", "part"),
    [
        (lambda d: b"", "is empty"),
        (lambda d: d[:-1], "no whole number of 3073-byte records"),
        (lambda d: d + b"\0", "no whole number of 3073-byte records"),
        (
            lambda d: d[: files.RECORD * 2] + b"\x0a" + d[files.RECORD * 2 + 1 :],
            "record 2 has the label 10, not 0 to 9",
        ),
    ],
)
def test_a_torn_file_in_a_folder_or_archive_is_named(
    folder: Path, tmp_path: Path, spoil: Callable[[bytes], bytes], part: str
) -> None:
    name = files.TRAIN_FILES[3]
    (folder / name).write_bytes(spoil(GOOD[name]))
    one_line(lambda: small(folder), str(folder / name), part)
    archive = tmp_path / "torn.tar.gz"
    archive.write_bytes(packed(GOOD | {name: spoil(GOOD[name])}))
    one_line(lambda: small(archive), str(archive), name, part)


def test_a_directory_in_a_files_place(folder: Path) -> None:
    (folder / files.TEST_FILE).unlink()
    (folder / files.TEST_FILE).mkdir()
    one_line(lambda: small(folder), files.TEST_FILE, "is missing")


def test_an_archive_that_is_not_there(tmp_path: Path) -> None:
    one_line(lambda: small(tmp_path / "no.tar.gz"), "--data-dir", "no such archive", error=UsageError)
    assert not list(tmp_path.iterdir())


# --- hostile and torn archives


@pytest.fixture
def small_caps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MEMBER_CAP", files.RECORD * RECORDS * 2)
    monkeypatch.setattr(files, "STREAM_CAP", 3_500_000)


@pytest.mark.usefixtures("small_caps")
@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_archive_is_refused_and_writes_nothing(case: str, tmp_path: Path) -> None:
    edit, part = HOSTILE[case]
    archive = tmp_path / "inner" / "given.tar.gz"
    archive.parent.mkdir()
    archive.write_bytes(packed(GOOD, edit))
    before = tree(tmp_path)
    one_line(lambda: small(archive), str(archive), part)
    assert tree(tmp_path) == before
    assert not Path("/tmp/adaptive_loss_evil.txt").exists()


@pytest.mark.usefixtures("small_caps")
@pytest.mark.parametrize("case", HOSTILE)
def test_unpacking_a_hostile_archive_leaves_no_folder(case: str, tmp_path: Path) -> None:
    archive = tmp_path / "inner" / cifar.ARCHIVE
    archive.parent.mkdir()
    archive.write_bytes(packed(GOOD, HOSTILE[case][0]))
    before = tree(tmp_path)
    one_line(lambda: cifar._unpack(archive, archive.with_name(files.FOLDER)), str(archive), HOSTILE[case][1])
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not an archive",
        gzip.compress(b"no tar inside" * 100),
        gzip.compress(b""),
        gzip.decompress(ARCHIVE),
        ARCHIVE + b"trailing rubbish",
        gzip.compress(b"\xff" * 4096),
    ],
    ids=["empty", "text", "gzip of text", "gzip of nothing", "tar without gzip", "rubbish after", "gzip of 0xff"],
)
def test_what_is_not_an_archive(data: bytes, tmp_path: Path) -> None:
    archive = tmp_path / "given.tar.gz"
    archive.write_bytes(data)
    one_line(lambda: small(archive), str(archive))


def test_an_archive_cut_anywhere_is_refused(tmp_path: Path) -> None:
    archive = tmp_path / "cut.tar.gz"
    for cut in [*range(1, len(ARCHIVE), len(ARCHIVE) // 24), len(ARCHIVE) - 1, len(ARCHIVE) - 8]:
        archive.write_bytes(ARCHIVE[:cut])
        one_line(lambda: files.read_archive(archive), str(archive))


def test_an_altered_archive_is_refused_or_holds_the_same_data(tmp_path: Path) -> None:
    archive, rng = tmp_path / "altered.tar.gz", random.Random(0)
    for position in [*range(10), *(rng.randrange(len(ARCHIVE)) for _ in range(40))]:
        data = bytearray(ARCHIVE)
        data[position] ^= 1 << rng.randrange(8)
        archive.write_bytes(data)
        try:
            read = files.read_archive(archive)
        except RunError as error:
            assert str(archive) in str(error) and "\n" not in str(error)
        else:  # gzip's own header holds a time that nothing depends on
            assert position < 10
            assert {name: records.tobytes() for name, records in read.records.items()} == GOOD


# --- download


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    server = Server()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(cifar, "URL", server.url)
    monkeypatch.setattr(cifar, "SIZE", len(ARCHIVE))
    monkeypatch.setattr(cifar, "SHA256", hashlib.sha256(ARCHIVE).hexdigest())
    monkeypatch.setattr(cifar, "TIMEOUT_SECONDS", 5.0)
    yield server
    server.http.shutdown()
    server.http.server_close()


def left(root: Path) -> list[str]:
    """What lies in the folder apart from the lock file."""
    return sorted(p.name for p in root.iterdir() if not p.name.endswith(".lock")) if root.is_dir() else []


def test_download_then_no_second_request(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "new" / "data"
    first = small(root)
    assert left(root) == [files.FOLDER, cifar.ARCHIVE]
    assert {f.name: f.read_bytes() for f in (root / files.FOLDER).iterdir()} == GOOD
    printed = capsys.readouterr()
    assert "100% of" in printed.err and printed.out == ""
    for again in (root, root / files.FOLDER):
        assert torch.equal(small(again).train.images, first.train.images)
    assert server.requests == 1


def test_naming_the_folder_that_is_not_there_yet_downloads_into_its_parent(server: Server, tmp_path: Path) -> None:
    small(tmp_path / files.FOLDER)
    assert left(tmp_path) == [files.FOLDER, cifar.ARCHIVE]


def test_an_archive_already_there_is_unpacked_without_a_request(server: Server, tmp_path: Path) -> None:
    (tmp_path / cifar.ARCHIVE).write_bytes(ARCHIVE)
    small(tmp_path)
    assert server.requests == 0 and left(tmp_path) == [files.FOLDER, cifar.ARCHIVE]


def test_an_own_archive_in_the_folder_is_read_in_place(server: Server, tmp_path: Path) -> None:
    own = packed(contents(seed=4))
    (tmp_path / cifar.ARCHIVE).write_bytes(own)
    assert small(tmp_path).provenance["archive_sha256"] == hashlib.sha256(own).hexdigest()
    assert server.requests == 0 and left(tmp_path) == [cifar.ARCHIVE]


def test_what_a_killed_process_left_is_replaced(server: Server, tmp_path: Path) -> None:
    (tmp_path / (cifar.ARCHIVE + ".part")).write_bytes(b"half")
    stale = tmp_path / f".{files.FOLDER}.part"
    stale.mkdir()
    (stale / files.TEST_FILE).write_bytes(b"half")
    small(tmp_path)
    assert left(tmp_path) == [files.FOLDER, cifar.ARCHIVE]


@pytest.mark.parametrize(
    ("spoil", "part"),
    [
        (lambda body: body[: len(body) // 2], f"of {len(ARCHIVE)} bytes came"),
        (lambda body: b"", f"only 0 of {len(ARCHIVE)} bytes came"),
        (lambda body: body + b"more", "longer than the expected"),
        (lambda body: packed(contents(seed=7)).ljust(len(ARCHIVE), b"\0")[: len(ARCHIVE)], "its SHA-256 is"),
    ],
    ids=["truncated", "empty", "longer", "altered"],
)
@pytest.mark.parametrize("honest", [True, False], ids=["true length", "announced length"])
def test_a_wrong_download_is_refused_and_leaves_nothing(
    server: Server, tmp_path: Path, spoil: Callable[[bytes], bytes], part: str, honest: bool
) -> None:
    server.body = spoil(ARCHIVE)
    longer = len(server.body) > len(ARCHIVE)
    server.announce = len(server.body) if honest or longer else len(ARCHIVE)
    one_line(lambda: small(tmp_path), server.url, part, "--data-dir")
    assert left(tmp_path) == []
    server.body, server.announce = ARCHIVE, len(ARCHIVE)
    assert len(small(tmp_path).train) == 80


def test_fifty_corruptions_none_accepted(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = random.Random(1)
    for _ in range(50):
        body = bytearray(ARCHIVE)
        body[rng.randrange(len(body))] ^= 1 << rng.randrange(8)
        server.body = bytes(body)
        one_line(lambda: small(tmp_path), "SHA-256")
    assert left(tmp_path) == [] and server.requests == 50
    capsys.readouterr()


def test_an_error_from_the_server(server: Server, tmp_path: Path) -> None:
    server.status = 404
    one_line(lambda: small(tmp_path), server.url, "404", "--data-dir")
    assert left(tmp_path) == []


def test_a_silent_server_is_given_up(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar, "TIMEOUT_SECONDS", 0.1)
    server.pause = 0.4
    one_line(lambda: small(tmp_path), server.url, "timed out", "--data-dir")
    assert left(tmp_path) == []


def test_a_server_that_drips_is_given_up(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar, "LIMIT_SECONDS", 0.3)
    server.drip = 0.05
    one_line(lambda: small(tmp_path), server.url, "not done after 0.3 seconds", "--data-dir")
    assert left(tmp_path) == []


def test_no_network_names_the_address_and_what_to_put_where(server: Server, tmp_path: Path) -> None:
    server.http.shutdown()
    server.http.server_close()
    one_line(lambda: small(tmp_path), f"cannot download {server.url}", "--data-dir PATH", "archive", files.FOLDER)
    assert left(tmp_path) == []


def test_a_place_that_cannot_be_written(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    one_line(lambda: small(tmp_path / "file" / "data"), "--data-dir", "file/data")


def test_a_full_disk_is_one_line(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    one_line(lambda: small(tmp_path), "No space left on device", "--data-dir")
    assert left(tmp_path) == []


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_eight_processes_at_once_download_once(server: Server, tmp_path: Path) -> None:
    server.pause = 0.2
    fork = multiprocessing.get_context("fork")
    workers = [fork.Process(target=cifar._download, args=(tmp_path,)) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
    assert [worker.exitcode for worker in workers] == [0] * 8
    assert server.requests == 1
    assert {f.name: f.read_bytes() for f in (tmp_path / files.FOLDER).iterdir()} == GOOD


def test_the_official_values() -> None:
    assert cifar.URL == "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
    assert cifar.SIZE == 170_052_171 and len(cifar.SHA256) == 64


# --- loaders


def test_loaders_give_normalised_batches_again_and_again(folder: Path) -> None:
    train, validation, test = cifar.get_cifar10_loaders(batch_size=32, data_dir=folder.parent, subset=100)
    assert [len(loader) for loader in (train, validation, test)] == [3, 1, 2]
    for loader, size in ((train, 80), (validation, 20), (test, RECORDS)):
        for _ in range(2):
            batches = list(loader)
            assert sum(len(labels) for _, labels in batches) == size
            assert all(x.dtype == torch.float32 and x.shape[1:] == (3, 32, 32) for x, _ in batches)
    first, second = (torch.cat([labels for _, labels in train]) for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(*(torch.cat([x for x, _ in test]) for _ in range(2)))


def test_loaders_are_seeded(folder: Path) -> None:
    def epoch(seed: int) -> torch.Tensor:
        return torch.cat([x for x, _ in cifar.get_cifar10_loaders(16, folder, 100, seed)[0]])

    assert torch.equal(epoch(1), epoch(1))
    assert not torch.equal(epoch(1), epoch(2))


def test_a_batch_larger_than_the_data_is_all_of_it(folder: Path) -> None:
    train, _, _ = cifar.get_cifar10_loaders(data_dir=folder, subset=100)
    assert len(train) == 1
    with pytest.raises(UsageError, match="--batch-size 0"):
        cifar.get_cifar10_loaders(batch_size=0, data_dir=folder, subset=100)
