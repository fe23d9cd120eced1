"""Something happens at the k-th moment at which a process touches the disk: a kill, or an error."""

from __future__ import annotations

import builtins
import contextlib
import io
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

Fault = Callable[[str], None]
"""Called before every write point with its name; what it raises, the writer meets."""


@contextlib.contextmanager
def at_write_points(fault: Fault) -> Iterator[None]:
    """Call ``fault`` before every open for writing, write, fsync, rename, truncation and removal of the main thread.

    A write is two points: before it, and when half of it has been done. TensorBoard's thread is left alone.
    """

    def watch(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            _call(fault, name)
            return original(*args, **kwargs)

        return watched

    def opened(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        writes = set(mode) & set("wax+") and isinstance(file, (str, os.PathLike))
        if not writes or str(file).startswith("/dev"):
            return real_open(file, mode, *args, **kwargs)
        _call(fault, "open")
        return _File(real_open(file, mode, *args, **kwargs), fault)

    real_open = builtins.open
    names = {os: ("fsync", "replace", "unlink", "mkdir", "rmdir", "truncate")}
    with contextlib.ExitStack() as stack:
        for module, functions in names.items():
            for name in functions:
                stack.enter_context(mock.patch.object(module, name, watch(name, getattr(module, name))))
        for module in (builtins, io):
            stack.enter_context(mock.patch.object(module, "open", opened))
        yield


class _File:
    """An open file whose writes are write points."""

    def __init__(self, file: Any, fault: Fault) -> None:
        self._file, self._fault = file, fault

    def write(self, content: Any) -> int:
        _call(self._fault, "write")
        half = len(content) // 2
        done = self._file.write(content[:half])
        self._file.flush()
        _call(self._fault, "half a write")
        return done + self._file.write(content[half:])

    def truncate(self, size: int) -> int:
        _call(self._fault, "truncate")
        return self._file.truncate(size)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _File:
        self._file.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._file.__exit__(*error)


def _call(fault: Fault, name: str) -> None:
    if threading.current_thread() is threading.main_thread():
        fault(name)


class Counter:
    """Counts the points, which is how many there are to choose from."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def __call__(self, name: str) -> None:
        self.names.append(name)


class KillAt(Counter):
    """SIGKILL to this very process at point ``place``, counted from 0."""

    def __init__(self, place: int) -> None:
        super().__init__()
        self.place = place

    def __call__(self, name: str) -> None:
        super().__call__(name)
        if len(self.names) > self.place:
            os.kill(os.getpid(), signal.SIGKILL)


class FailFrom(Counter):
    """The error ``number`` at point ``place`` and at every point after it, as on a full disk."""

    def __init__(self, place: int, number: int) -> None:
        super().__init__()
        self.place, self.number = place, number

    def __call__(self, name: str) -> None:
        super().__call__(name)
        if len(self.names) > self.place:
            raise OSError(self.number, os.strerror(self.number))
