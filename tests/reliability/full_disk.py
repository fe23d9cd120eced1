"""Full disk, no permission: the command says so and fails, its last good checkpoint loads, and it goes on once it can.

    python -m tests.reliability.full_disk

From some write point on, every further one meets the error, as on a disk that has filled up or a folder whose rights
have changed; the points are spread over the whole command.
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
import tempfile
from pathlib import Path

from tests.reliability import forks
from tests.reliability.command import command, ended_wrong, left_wrong, run_folder, told
from tests.reliability.faults import FailFrom, at_write_points
from tests.reliability.kill_checkpoint import write_points
from tests.reliability.rows import Row

FAULTS = 50
ERRORS = (errno.ENOSPC, errno.EACCES)


def torture(faults: int = FAULTS) -> Row:
    """Let the disk fail under the command at many points."""
    failed = []
    with tempfile.TemporaryDirectory() as place:
        base, log = Path(place), Path(place) / "log"
        names, _ = write_points(base / "whole", log)
        for trial in range(faults):
            point, number = trial * len(names) // faults, ERRORS[trial % len(ERRORS)]
            wrong = _trial(base / "faulty", run_folder(base / "whole"), FailFrom(point, number), log)
            if wrong:
                failed.append(f"point {point}, {names[point]}: {'; '.join(wrong)[:300]}")
                print(failed[-1], file=sys.stderr, flush=True)
    note = f"{len(names)} write points of {len(set(names))} kinds" + "".join(f"; {line}" for line in failed[:3])
    return Row("full disk, no permission", faults, len(failed), note)


def _trial(folder: Path, whole: Path, fault: FailFrom, log: Path) -> list[str]:
    log.unlink()
    code, acknowledged = told(folder, lambda: at_write_points(fault), log)
    said = log.read_text()
    wrong = [f"exit code {code}: {said[-200:]}"] if code != 1 else []
    if "error: " not in said or os.strerror(fault.number) not in said or "Traceback" in said:
        wrong.append(f"it said {said[-200:]!r}")
    wrong += left_wrong(run_folder(folder), whole, acknowledged)
    code = forks.call(lambda: command(folder), log)
    wrong += [f"exit code {code}: {log.read_text()[-200:]}"] if code else ended_wrong(run_folder(folder), whole)
    shutil.rmtree(folder, ignore_errors=True)
    return wrong


if __name__ == "__main__":
    print(torture())
