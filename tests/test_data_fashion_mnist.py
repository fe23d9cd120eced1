"""Fashion-MNIST's files: read, downloaded once, and refused in one line when anything about them is wrong."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from adaptive_loss.data import datasets
from adaptive_loss.data import fashion_mnist as fashion
from adaptive_loss.errors import RunError, UsageError

IMAGES = 40
TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS = fashion.PUBLISHED


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def contents() -> dict[str, bytes]:
    """Four small files as published, unpacked; each image is told apart by its noise."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, IMAGES, 28, 28), np.uint8)
    labels = (np.arange(IMAGES) % 10).astype(np.uint8)
    return {
        TRAIN_IMAGES: idx(images[0]),
        TRAIN_LABELS: idx(labels),
        TEST_IMAGES: idx(images[1]),
        TEST_LABELS: idx(labels),
    }


GOOD = contents()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "data" / fashion.FOLDER
    path.mkdir(parents=True)
    for name, content in GOOD.items():
        (path / name).write_bytes(gzip.compress(content, 1))
    return path


def refusal(call: Callable[[], object], *parts: str, error: type[Exception] = RunError) -> None:
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_hyphens_and_underscores_are_one_name() -> None:
    assert datasets.get("fashion-mnist") is datasets.get("fashion_mnist") is fashion.load


def test_folder_and_its_parent_give_the_same_data(folder: Path) -> None:
    first, other = fashion.load(folder, subset=20), fashion.load(folder.parent, subset=20)
    assert first.name == "fashion_mnist" and first.image_shape == (1, 28, 28) and len(first.classes) == 10
    assert [len(getattr(first, name)) for name in ("train", "probe", "select", "test")] == [16, 2, 2, IMAGES]
    assert torch.equal(first.held_in.images, other.held_in.images)
    assert first.provenance == other.provenance


def test_images_are_the_file_s_and_keep_their_labels(folder: Path) -> None:
    dataset = fashion.load(folder, subset=30)
    raw = np.frombuffer(GOOD[TRAIN_IMAGES][16:], np.uint8).reshape(-1, 784)
    labels = {image.tobytes(): number % 10 for number, image in enumerate(raw)}
    held_in = dataset.held_in
    found = [labels[image.numpy().tobytes()] for image in held_in.images]
    assert found == held_in.labels.tolist() and len({image.numpy().tobytes() for image in held_in.images}) == 30
    assert dataset.test.images.numpy().tobytes() == GOOD[TEST_IMAGES][16:]


def test_splits_are_seeded_and_the_test_is_not(folder: Path) -> None:
    one, again, other = (fashion.load(folder, seed=seed, subset=20) for seed in (1, 1, 2))
    assert torch.equal(one.train.images, again.train.images)
    assert not torch.equal(one.train.images, other.train.images)
    assert torch.equal(one.test.images, other.test.images)


def test_provenance_does_not_depend_on_the_packing(folder: Path) -> None:
    before = fashion.load(folder, subset=20).provenance["sha256"]
    for name, content in GOOD.items():
        (folder / name).write_bytes(gzip.compress(content, 9))
    assert fashion.load(folder, subset=20).provenance["sha256"] == before


def test_impossible_subsets_and_places(folder: Path) -> None:
    refusal(lambda: fashion.load(folder, subset=9), "--subset 9", "10 or more", error=UsageError)
    refusal(lambda: fashion.load(folder, subset=50), "class 'T-shirt/top' has 4", "size is 40", error=UsageError)
    refusal(lambda: fashion.load(folder / TRAIN_IMAGES), "is a file", error=UsageError)


def announcing(*shape: int) -> bytes:
    return struct.pack(f">BBBB{len(shape)}I", 0, 0, 8, len(shape), *shape)


SPOILT: dict[str, tuple[str, bytes, str]] = {
    "empty": (TRAIN_IMAGES, b"", "no IDX file"),
    "not gzip": (TRAIN_IMAGES, GOOD[TRAIN_IMAGES], "cannot read"),
    "cut gzip": (TRAIN_IMAGES, gzip.compress(GOOD[TRAIN_IMAGES])[:-9], "cannot read"),
    "wrong checksum": (TRAIN_LABELS, gzip.compress(GOOD[TRAIN_LABELS])[:-8] + bytes(8), "cannot read"),
    "labels as images": (TRAIN_IMAGES, gzip.compress(GOOD[TRAIN_LABELS]), "no IDX file of bytes in 3 dimensions"),
    "floats": (TRAIN_LABELS, gzip.compress(b"\0\0\x0d\1" + GOOD[TRAIN_LABELS][4:]), "no IDX file"),
    "header cut": (TEST_IMAGES, gzip.compress(GOOD[TEST_IMAGES][:9]), "no IDX file"),
    "too few bytes": (TEST_IMAGES, gzip.compress(GOOD[TEST_IMAGES][:-1]), f"ends after {784 * IMAGES - 1}"),
    "too many bytes": (TEST_LABELS, gzip.compress(GOOD[TEST_LABELS] + b"\0"), "longer than its header"),
    "other size": (TRAIN_IMAGES, gzip.compress(announcing(1, 32, 32) + bytes(1024)), "32×32 pixels, not 28×28"),
    "no images": (TRAIN_IMAGES, gzip.compress(announcing(0, 28, 28)), "announces 0 records"),
    "a bomb": (TRAIN_LABELS, gzip.compress(announcing(4_000_000_000) + bytes(1000)), "announces 4000000000 records"),
    "label 10": (TRAIN_LABELS, gzip.compress(idx(np.full(IMAGES, 10, np.uint8))), "record 0 has the label 10"),
    "other number": (TRAIN_LABELS, gzip.compress(idx(np.zeros(IMAGES - 1, np.uint8))), "40 images but 39 labels in"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_a_torn_or_hostile_file_is_named(case: str, folder: Path) -> None:
    name, data, part = SPOILT[case]
    (folder / name).write_bytes(data)
    refusal(lambda: fashion.load(folder, subset=20), name, str(folder), part)


def test_a_directory_in_a_file_s_place(folder: Path) -> None:
    (folder / TEST_LABELS).unlink()
    (folder / TEST_LABELS).mkdir()
    refusal(lambda: fashion.load(folder, subset=20), str(folder / TEST_LABELS))


# --- download


class Server:
    """Serves files by name, and notes which were asked for."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.asked: list[str] = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                name = self.path.lstrip("/")
                outer.asked.append(name)
                self.send_response(200 if name in files else 404)
                self.send_header("Content-Length", str(len(files.get(name, b""))))
                self.end_headers()
                self.wfile.write(files.get(name, b""))

            def log_message(self, format: str, *args: object) -> None:
                del format, args

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()


@pytest.fixture
def files() -> dict[str, bytes]:
    return {name: gzip.compress(content, 1) for name, content in GOOD.items()}


@pytest.fixture
def server(files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    server = Server(files)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(fashion, "URL", f"http://127.0.0.1:{server.http.server_address[1]}/")
    published = {name: (len(data), hashlib.sha256(data).hexdigest()) for name, data in files.items()}
    monkeypatch.setattr(fashion, "PUBLISHED", published)
    yield server
    server.http.shutdown()
    server.http.server_close()


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def test_what_is_missing_is_downloaded_once(server: Server, folder: Path, tmp_path: Path) -> None:
    (folder / TEST_LABELS).unlink()
    whole = fashion.load(folder, subset=20)
    assert server.asked == [TEST_LABELS]
    fetched = fashion.load(tmp_path / "new", subset=20)
    assert torch.equal(whole.train.images, fetched.train.images)
    assert left(tmp_path / "new" / fashion.FOLDER) == sorted(fashion.PUBLISHED)
    fashion.load(tmp_path / "new", subset=20)
    assert server.asked == [TEST_LABELS, *fashion.PUBLISHED]


def test_an_altered_download_leaves_no_file(server: Server, files: dict[str, bytes], tmp_path: Path) -> None:
    files[TRAIN_LABELS] = files[TRAIN_LABELS][:-1] + b"\xff"
    refusal(lambda: fashion.load(tmp_path, subset=20), TRAIN_LABELS, "SHA-256", "by hand")
    assert left(tmp_path / fashion.FOLDER) == [TRAIN_IMAGES]
    del files[TRAIN_LABELS]
    refusal(lambda: fashion.load(tmp_path, subset=20), TRAIN_LABELS, "404", "by hand")
