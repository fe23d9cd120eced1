"""Fetching one known file over HTTP: whole and unaltered under its name, or not there at all."""

from __future__ import annotations

import hashlib
import http.client
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from adaptive_loss.errors import RunError
from adaptive_loss.files import sync_folder

CHUNK = 1 << 18
LIMIT_SECONDS = 2 * 3600.0
"""For a whole download: 24 kB a second of the largest one."""


@dataclass(frozen=True)
class Remote:
    """A file on a server, and how to tell that it arrived whole.

    Attributes:
        url: its address.
        size: its length in bytes.
        sha256: its SHA-256, in hexadecimal.
        by_hand: what a user without network should do, as the end of a sentence.
    """

    url: str
    size: int
    sha256: str
    by_hand: str


def fetch(remote: Remote, target: Path, *, timeout: float, limit: float) -> None:
    """Download ``remote`` to ``target``: to a ``.part`` name first, checked, synced, then renamed.

    The caller holds the folder's :func:`~adaptive_loss.locks.file_lock`, so the ``.part`` name is this process's own.

    Args:
        remote: the file.
        target: where to put it; its folder exists.
        timeout: seconds the server may stay silent.
        limit: seconds for the whole, so that a server that drips cannot hold it for ever.

    Raises:
        RunError: the server cannot be reached, or what came is not the expected file; nothing is left behind.
    """
    part = target.with_name(target.name + ".part")
    try:
        with part.open("wb") as file:
            received, digest = _stream(remote, file, timeout, limit)
            _check(remote, received, digest)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, target)
        sync_folder(target.parent)
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        # A plain URLError wraps the cause in brackets of its own; an HTTPError's text has the status code.
        cause = error.reason if type(error) is urllib.error.URLError else error
        raise RunError(f"cannot download {remote.url} ({one_line(cause)}); {remote.by_hand}") from error
    finally:
        part.unlink(missing_ok=True)


def _stream(remote: Remote, file: IO[bytes], timeout: float, limit: float) -> tuple[int, str]:
    """Copy the answer into ``file``, one chunk beyond the expected size at most; its length and SHA-256."""
    sha, received, deadline = hashlib.sha256(), 0, time.monotonic() + limit
    with urllib.request.urlopen(remote.url, timeout=timeout) as answer, _progress(remote) as report:
        while received <= remote.size and (chunk := answer.read1(CHUNK)):  # what has come
            if time.monotonic() > deadline:
                raise TimeoutError(f"not done after {limit:g} seconds")
            file.write(chunk)
            sha.update(chunk)
            received += len(chunk)
            report(received)
    return received, sha.hexdigest()


def _check(remote: Remote, received: int, digest: str) -> None:
    if received > remote.size:
        fault = f"it is longer than the expected {remote.size} bytes"
    elif received < remote.size:
        fault = f"only {received} of {remote.size} bytes came"
    elif digest != remote.sha256:
        fault = f"its SHA-256 is {digest}, not {remote.sha256}"
    else:
        return
    raise RunError(f"the download of {remote.url} is not the expected file: {fault}; try again, or {remote.by_hand}")


@contextmanager
def _progress(remote: Remote) -> Iterator[Callable[[int], None]]:
    """A function to be told how many bytes came: a bar on a terminal, a line each 10% elsewhere."""
    name = remote.url.rsplit("/", 1)[-1]
    if not sys.stderr.isatty():
        yield _plain_lines(name, remote.size)
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = ("{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(f"downloading {name}", total=remote.size)
        yield lambda received: bar.update(task, completed=received)


def _plain_lines(name: str, size: int) -> Callable[[int], None]:
    shown = -1

    def report(received: int) -> None:
        nonlocal shown
        tenth = 10 * received // size
        if tenth > shown:
            shown = tenth
            print(f"downloading {name}: {10 * tenth}% of {size / 1e6:.1f} MB", file=sys.stderr, flush=True)

    return report


def one_line(error: BaseException | str) -> str:
    """What an exception says, without line breaks; its type's name where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__
