"""How a run hears that it should end: a signal, a file that appears, or the death of the study it belongs to."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from adaptive_loss.errors import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGINT)


@dataclass(frozen=True)
class Lead:
    """The process that leads a study's workers, as a worker knows it.

    Args:
        pid: its process id; a worker whose parent is another process has lost its study.
        file: appears when the workers should save and end.
    """

    pid: int
    file: Path

    @property
    def is_gone(self) -> bool:
        """Whether this worker has lost its study."""
        return os.getppid() != self.pid


class StopRequest:
    """While its ``with`` lasts, SIGTERM and SIGINT are taken as a request, and a second one ends the process at once.

    A signal that the process ignores stays ignored (SIGINT of a job in the background). Outside the main thread, where
    Python gives no signals, only files and the lead are looked at.

    Args:
        files: any of them there is a request too, with the exit code of SIGTERM.
        lead: of the study, in one of its workers.
        tell: a file to make when a signal comes, so that other processes hear of it.
    """

    def __init__(self, files: Sequence[Path] = (), *, lead: Lead | None = None, tell: Path | None = None) -> None:
        self._files = [*files, *([] if lead is None else [lead.file])]
        self._lead, self._tell = lead, tell
        self._signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            heard = [number for number in SIGNALS if signal.getsignal(number) not in (signal.SIG_IGN, None)]
            self._before = {number: signal.signal(number, self._hear) for number in heard}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None:
            os._exit(128 + number)
        self._signal = number
        if self._tell is not None:
            self._tell.touch()

    def asked(self) -> Stopped | None:
        """The request there is, if any, to be raised once the work is saved."""
        if self._signal is not None:
            return Stopped(f"stopped by {signal.Signals(self._signal).name}", 128 + self._signal)
        found = next((file for file in self._files if file.exists()), None)
        if found is not None:
            return Stopped(f"stopped because {found} is there", 128 + signal.SIGTERM)
        if self._lead is not None and self._lead.is_gone:
            return Stopped("stopped because the study has died", 128 + signal.SIGTERM)
        return None
