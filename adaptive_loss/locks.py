"""Locks between processes: held on an open file, freed by the system when the holder dies. Standard library only."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from adaptive_loss.errors import RunError

POLL_S = 0.1
PATIENCE_S = 5.0
"""How long a refusal waits: what a killed process started is gone within this time."""
RUNNING = "running"
"""A file of this name in a run's folder marks a run that a process is at, so that a dead one can be told."""


@contextmanager
def file_lock(path: Path, waiting: str) -> Iterator[None]:
    """Hold ``path`` as a lock between processes, waiting for it as long as it takes.

    Args:
        path: the lock file; made if missing and left there, since removing it would let two holders in.
        waiting: a line for standard error when another process holds it.
    """
    with path.open("ab") as file:
        told = False
        while not try_lock(file):
            if not told:
                print(waiting, file=sys.stderr, flush=True)
            told = True
            time.sleep(POLL_S)
        yield  # closing the file frees the lock


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Be the one process that writes the run in ``folder``, an existing one; its marker is there while it lasts.

    Raises:
        RunError: another process is at that run.
    """
    marker, deadline = folder / RUNNING, time.monotonic() + PATIENCE_S
    while True:
        with marker.open("ab") as file:
            # The last holder may have removed the marker between our opening it and our lock.
            if try_lock(file) and _is(file, marker):
                try:
                    yield
                finally:
                    with contextlib.suppress(PermissionError):  # Windows keeps an open file; unlocked it says nothing
                        marker.unlink(missing_ok=True)
                return
        if time.monotonic() > deadline:
            raise RunError(f"{folder} is in use by another process; wait for it or choose another output folder")
        time.sleep(POLL_S)


def _is(file: IO[bytes], path: Path) -> bool:
    """Whether ``path`` still names the open file."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


if sys.platform == "win32":
    import msvcrt

    _FAR = 1 << 30  # a byte that no file has: others must still be able to read what is there

    def try_lock(file: IO[Any]) -> bool:
        """Lock an open file unless another process has; the lock lasts until it is closed."""
        file.seek(_FAR)
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

else:
    import fcntl

    def try_lock(file: IO[Any]) -> bool:
        """Lock an open file unless another process has; the lock lasts until it is closed."""
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
