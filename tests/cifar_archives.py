"""Small archives like CIFAR-10's, good and hostile, and a server for them."""

from __future__ import annotations

import io
import tarfile
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np

from adaptive_loss.data import _cifar10_files as files
from adaptive_loss.data import cifar10_loader as cifar

RECORDS = 60
Edit = Callable[[tarfile.TarFile, dict[str, bytes]], None]


def contents(seed: int = 0, records: int = RECORDS) -> dict[str, bytes]:
    """Six small files; each image is told apart by its noise."""
    rng = np.random.default_rng(seed)
    made = {}
    for name in files.FILES:
        block = np.repeat(rng.integers(0, 256, (records, files.RECORD // 24 + 1), np.uint8), 24, axis=1)
        block = block[:, : files.RECORD].copy()
        block[:, 0] = np.arange(records) % 10
        made[name] = block.tobytes()
    return made


def add(archive: tarfile.TarFile, name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "") -> None:
    member = tarfile.TarInfo(name)
    member.type, member.linkname, member.size = kind, link, len(data)
    archive.addfile(member, io.BytesIO(data))


def packed(data: dict[str, bytes], edit: Edit | None = None) -> bytes:
    """A .tar.gz like the official one; ``edit`` may add members or take files out first."""
    buffer, data = io.BytesIO(), dict(data)
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as archive:
        add(archive, files.FOLDER, kind=tarfile.DIRTYPE)
        add(archive, f"{files.FOLDER}/readme.html", b"<html></html>")
        if edit:
            edit(archive, data)
        for name, content in data.items():
            add(archive, f"{files.FOLDER}/{name}", content)
    return buffer.getvalue()


GOOD = contents()
ARCHIVE = packed(GOOD)


MEMBER = f"{files.FOLDER}/{files.TRAIN_FILES[0]}"
OTHER = f"{files.FOLDER}/notes.txt"


def instead(kind: bytes, link: str = "") -> Edit:
    def edit(archive: tarfile.TarFile, data: dict[str, bytes]) -> None:
        del data[files.TRAIN_FILES[0]]
        add(archive, MEMBER, kind=kind, link=link)

    return edit


def extra(name: str, data: bytes = b"x", kind: bytes = tarfile.REGTYPE, link: str = "") -> Edit:
    return lambda archive, _: add(archive, name, data if kind == tarfile.REGTYPE else b"", kind, link)


def without(name: str) -> Edit:
    def edit(archive: tarfile.TarFile, data: dict[str, bytes]) -> None:
        del archive, data[name]

    return edit


def too_large(archive: tarfile.TarFile, data: dict[str, bytes]) -> None:
    data[files.TRAIN_FILES[0]] = bytes(files.RECORD * (RECORDS * 2 + 1))


def huge_header(archive: tarfile.TarFile, data: dict[str, bytes]) -> None:
    member = tarfile.TarInfo(OTHER)
    member.pax_headers = {"comment": "x" * 4_000_000}
    archive.addfile(member)


def long_name_chain(archive: tarfile.TarFile, data: dict[str, bytes]) -> None:
    """Thousands of GNU long-name headers, each announcing the next."""
    block = tarfile.TarInfo("././@LongLink")
    block.type, block.size = tarfile.GNUTYPE_LONGNAME, 5
    assert archive.fileobj is not None
    archive.fileobj.write((block.tobuf(tarfile.GNU_FORMAT) + b"evil\0".ljust(512, b"\0")) * 3000)


def many_members(archive: tarfile.TarFile, data: dict[str, bytes]) -> None:
    for number in range(100):
        add(archive, f"{files.FOLDER}/{number}.txt")


HOSTILE: dict[str, tuple[Edit, str]] = {
    "parent path": (extra("../evil.txt"), "outside its folder"),
    "parent path inside": (extra(f"{files.FOLDER}/../../evil.txt"), "outside its folder"),
    "backslash parent path": (extra("..\\evil.txt"), "outside its folder"),
    "absolute path": (extra("/tmp/adaptive_loss_evil.txt"), "outside its folder"),
    "symbolic link as a file": (instead(tarfile.SYMTYPE, "/etc/passwd"), "no plain file"),
    "symbolic link beside": (extra(OTHER, kind=tarfile.SYMTYPE, link="/etc"), "no plain file"),
    "hard link as a file": (instead(tarfile.LNKTYPE, "/etc/passwd"), "no plain file"),
    "character device": (instead(tarfile.CHRTYPE), "no plain file"),
    "block device": (extra(OTHER, kind=tarfile.BLKTYPE), "no plain file"),
    "pipe": (instead(tarfile.FIFOTYPE), "no plain file"),
    "directory as a file": (instead(tarfile.DIRTYPE), "no plain file"),
    "folder is a link": (extra(files.FOLDER, kind=tarfile.SYMTYPE, link="/tmp"), "no plain file"),
    "file twice": (extra(MEMBER, GOOD[files.TRAIN_FILES[0]]), "twice"),
    "file too large": (too_large, "at most are read"),
    "other file too large": (extra(OTHER, bytes(files.RECORD * (RECORDS * 2 + 1))), "at most are read"),
    "huge header": (huge_header, "unpacks to more than"),
    "chain of long names": (long_name_chain, "not a whole .tar.gz"),
    "many members": (many_members, "more than 64 members"),
    "file missing": (without(files.TEST_FILE), f"no member {files.FOLDER}/{files.TEST_FILE}"),
    "other folder": (lambda _, data: data.clear(), "no member"),
}


class Server:
    """Serves one archive over HTTP, in the manner asked for, and counts the requests."""

    def __init__(self) -> None:
        self.body, self.announce, self.status, self.requests = ARCHIVE, len(ARCHIVE), 200, 0
        self.pause = 0.0  # seconds before the answer
        self.drip = 0.0  # seconds between its bytes
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.requests += 1
                time.sleep(outer.pause)
                self.send_response(outer.status)
                self.send_header("Content-Length", str(outer.announce))
                self.end_headers()
                for part in [outer.body] if not outer.drip else [bytes([byte]) for byte in outer.body]:
                    self.wfile.write(part)
                    time.sleep(outer.drip)

            def log_message(self, format: str, *args: object) -> None:
                del format, args

        class Quiet(ThreadingHTTPServer):
            def handle_error(self, request: object, client_address: object) -> None:
                del request, client_address  # a client that hangs up is part of the test

        self.http = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/{cifar.ARCHIVE}"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()
