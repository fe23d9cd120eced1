"""SIGTERM: in a step, an evaluation or a save, the run saves itself, ends with code 143 and goes on exactly.

    python -m tests.reliability.sigterm

Every fifth signal is SIGINT, whose code is 130.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from adaptive_loss import checkpoint
from adaptive_loss.tasks.classify import Classify
from tests.reliability import forks
from tests.reliability.command import command, ended_wrong, left_wrong, run_folder, told
from tests.reliability.rows import Row

SIGNALS = 100
SECONDS = 30.0
"""From the signal to the end of the process."""
MOMENTS: dict[str, tuple[Any, str, int]] = {
    "step": (Classify, "losses", 10),
    "eval": (Classify, "evaluate", 4),
    "save": (checkpoint, "write_atomic", 20),
}
"""What is called then, and about how often the command calls it."""


def torture(signals: int = SIGNALS) -> Row:
    """Send signals to the command at all moments."""
    dice, failed, slowest = random.Random(0), [], 0.0
    with tempfile.TemporaryDirectory() as place:
        base, log = Path(place), Path(place) / "log"
        assert forks.call(lambda: command(base / "whole"), log) == 0, log.read_text()
        for trial in range(signals):
            moment = tuple(MOMENTS)[trial % len(MOMENTS)]
            number = signal.SIGINT if trial % 5 == 4 else signal.SIGTERM
            sent = Sent(moment, dice.randrange(MOMENTS[moment][2]), number, base / "sent")
            seconds, wrong = _trial(base / "stopped", run_folder(base / "whole"), sent, log)
            slowest = max(slowest, seconds)
            if wrong:
                failed.append(f"{number.name} in {moment} {sent.call}: {'; '.join(wrong)[:300]}")
                print(failed[-1], file=sys.stderr, flush=True)
    note = f"saved and gone within {slowest:.2f} s" + "".join(f"; {line}" for line in failed[:3])
    return Row("SIGTERM", signals, len(failed), note)


@dataclass(frozen=True)
class Sent:
    """A signal that the process sends itself in the middle of a call, and leaves the time of in a file."""

    moment: str
    call: int
    number: signal.Signals
    file: Path

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """While it lasts, the signal is sent at its moment."""
        owner, name, _ = MOMENTS[self.moment]
        original: Callable[..., Any] = getattr(owner, name)
        left = iter(range(self.call, -1, -1))

        def called(*args: Any, **kwargs: Any) -> Any:
            if next(left, None) == 0:
                self.file.write_text(str(time.monotonic()))
                os.kill(os.getpid(), self.number)
            return original(*args, **kwargs)

        with mock.patch.object(owner, name, called):
            yield


def _trial(folder: Path, whole: Path, sent: Sent, log: Path) -> tuple[float, list[str]]:
    """Seconds from the signal to the end of the process, and what is wrong."""
    code, acknowledged = told(folder, sent, log)
    seconds = time.monotonic() - float(sent.file.read_text())
    wrong = [f"{seconds:.1f} s"] if seconds > SECONDS else []
    wrong += [f"exit code {code}: {log.read_text()[-200:]}"] if code != 128 + sent.number else []
    wrong += left_wrong(run_folder(folder), whole, acknowledged)
    code = forks.call(lambda: command(folder), log)
    wrong += [f"exit code {code}: {log.read_text()[-200:]}"] if code else ended_wrong(run_folder(folder), whole)
    shutil.rmtree(folder)
    return seconds, wrong


if __name__ == "__main__":
    print(torture())
