"""A study is told to end: its workers save, the command gives its code, nobody stays behind, and it goes on exactly.

    python -m tests.reliability.study_stopped

By SIGTERM to the command, by Ctrl-C (SIGINT to the whole process group), by a preemption file, and by SIGKILL to the
command, whose workers then notice that they are alone.
"""

from __future__ import annotations

import csv
import os
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.reliability.rows import Row

ROOT = Path(__file__).parents[2]
FLAGS = shlex.split(
    "ablate --modes baseline full --seeds 1 2 --dataset digits --subset 100 --batch-size 15 --epochs 6 "
    "--save-every 1 --threads 1 --device cpu --precision fp32"
)
WAYS = {"SIGTERM": 143, "Ctrl-C": 130, "file": 143, "SIGKILL": -9}
TRIALS = 12
PATIENCE_S = 110.0


def torture(trials: int = TRIALS) -> Row:
    """Stop a study of four runs on two workers, in every way."""
    dice, failed = random.Random(0), []
    with tempfile.TemporaryDirectory() as place:
        whole = rows(run_whole(Path(place) / "whole"))
        for trial in range(trials):
            way = tuple(WAYS)[trial % len(WAYS)]
            wrong = stopped(way, Path(place) / str(trial), whole, steps=dice.randrange(1, 25))
            failed += [f"{way}: {'; '.join(wrong)[:300]}"] if wrong else []
            print(f"  {way}: {wrong or 'ok'}", file=sys.stderr, flush=True)
    return Row("a study is stopped", trials, len(failed), "; ".join(failed[:3]))


def stopped(way: str, folder: Path, whole: list[list[str]], steps: int) -> list[str]:
    """What is wrong with a study that was stopped after about so many ``steps`` of a run, and went on."""
    folder.mkdir()
    notice = folder / "notice"
    command = [sys.executable, "-m", "adaptive_loss", *FLAGS, "--jobs", "2", "--output-dir", str(folder)]
    study = subprocess.Popen(
        [*command, "--preempt-file", str(notice)], cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    _until(lambda: any(_step(file) >= steps for file in folder.rglob("step_*.json")) or study.poll() is not None)
    if way == "file":
        notice.touch()
    elif way == "Ctrl-C":
        os.killpg(study.pid, signal.SIGINT)
    else:
        study.send_signal(getattr(signal, way))
    said = study.communicate(timeout=PATIENCE_S)[1]
    wrong = [] if study.returncode == WAYS[way] else [f"exit code {study.returncode}: {said[-300:]}"]
    if not _until(lambda: not _processes(study.pid)):
        wrong.append("a process stayed behind")
    notice.unlink(missing_ok=True)
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    wrong += [] if again.returncode == 0 else [f"going on gave {again.returncode}: {again.stderr[-300:]}"]
    return wrong + ([] if wrong or rows(folder) == whole else ["the results are not those of a study left alone"])


def run_whole(folder: Path) -> Path:
    """The study, left alone, one run after the other."""
    command = [sys.executable, "-m", "adaptive_loss", *FLAGS, "--jobs", "1", "--output-dir", str(folder)]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True, timeout=PATIENCE_S)
    return folder


def rows(folder: Path) -> list[list[str]]:
    """The results, but for the seconds they took."""
    with (folder / "ablation_results.csv").open(newline="") as file:
        return [row[:-1] for row in csv.reader(file)]


def _step(manifest: Path) -> int:
    return int(manifest.stem.removeprefix("step_"))


def _processes(session: int) -> list[str]:
    """The command lines of the processes of a session that are still at work."""
    found = subprocess.run(["ps", "-o", "stat=,args=", "-s", str(session)], capture_output=True, text=True, check=False)
    return [line for line in found.stdout.splitlines() if "popen_loky" in line and not line.startswith("Z")]


def _until(true: Callable[[], bool], seconds: float = PATIENCE_S) -> bool:
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


if __name__ == "__main__":
    print(torture())
