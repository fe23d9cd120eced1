"""Kill at any moment: whatever a SIGKILL leaves of a run can be read, holds all it acknowledged, and goes on exactly.

    python -m tests.reliability.kill_checkpoint

Most kills come between two opens, writes, fsyncs, renames and removals of the command, or in the middle of a write; the
others at a random time. Half of the runs that go on are killed once more. This is the part about a run's folder; the
study's ledger has its own.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from tests.reliability import forks
from tests.reliability.command import command, ended_wrong, left_wrong, run_folder, told
from tests.reliability.faults import Counter, KillAt, at_write_points
from tests.reliability.rows import Row

KILLS = 200
AT_RANDOM_TIMES = 50
Around = Callable[[], AbstractContextManager[Any]]


def write_points(folder: Path, log: Path) -> tuple[list[str], float]:
    """Run the command whole; the names of its write points in order, and the seconds it took."""
    file, begin = folder.with_name("points"), time.monotonic()

    def work() -> int:
        counter = Counter()
        with at_write_points(counter):
            code = command(folder)
        file.write_text("\n".join(counter.names))
        return code

    assert forks.call(work, log) == 0, log.read_text()
    return file.read_text().split("\n"), time.monotonic() - begin


def torture(kills: int = KILLS, at_random_times: int = AT_RANDOM_TIMES) -> Row:
    """Kill the command again and again."""
    dice, failed = random.Random(0), []
    with tempfile.TemporaryDirectory() as place:
        base, log = Path(place), Path(place) / "log"
        names, seconds = write_points(base / "whole", log)
        for trial in range(kills):
            timed = trial < at_random_times
            first = _after(dice.uniform(0, seconds)) if timed else _at(dice.randrange(len(names)))
            second = [_at(dice.randrange(len(names) // 2))] if trial % 2 else []
            wrong = _trial(base / "killed", run_folder(base / "whole"), [first, *second], log)
            if wrong:
                failed.append(f"kill {trial}: {'; '.join(wrong)[:300]}")
                print(failed[-1], file=sys.stderr, flush=True)
    note = f"{len(names)} write points of {len(set(names))} kinds" + "".join(f"; {line}" for line in failed[:3])
    return Row("kill at any moment: the run's folder", kills, len(failed), note)


def _trial(folder: Path, whole: Path, kills: Sequence[Around], log: Path) -> list[str]:
    """What is wrong after each of the ``kills`` of one run, and at its end."""
    wrong = []
    for around in kills:
        code, acknowledged = told(folder, around, log)
        wrong += [f"exit code {code}: {log.read_text()[-200:]}"] if code not in (0, -signal.SIGKILL) else []
        wrong += left_wrong(run_folder(folder), whole, acknowledged)
    code = forks.call(lambda: command(folder), log)
    wrong += [f"exit code {code}: {log.read_text()[-200:]}"] if code else ended_wrong(run_folder(folder), whole)
    shutil.rmtree(folder)
    return wrong


def _at(place: int) -> Around:
    return lambda: at_write_points(KillAt(place))


@contextlib.contextmanager
def _timer(seconds: float) -> Iterator[None]:
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL))
    timer.daemon = True
    timer.start()
    yield
    timer.cancel()


def _after(seconds: float) -> Around:
    return lambda: _timer(seconds)


if __name__ == "__main__":
    print(torture())
