"""Two runs, one folder: of 16 processes at once, one writes and the others are refused, or come when it is done."""

from __future__ import annotations

import csv
import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

from adaptive_loss.trainer import train_phase1
from tests.reliability.kills import RESULTS
from tests.reliability.rows import Row
from tests.reliability.stub_study import STEPS, TRAININGS, ablate, ended, forked, stubbed

PROCESSES = 16


def torture(times: int = 10) -> list[Row]:
    """Ten times 16 processes each: one study, one run, and studies in folders of their own."""
    return [studies(times), runs(times), apart(times)]


def studies(times: int) -> Row:
    """16 processes with the same study and the same folder."""
    faults = Counter[str]()
    for _ in range(times):
        with tempfile.TemporaryDirectory() as root:
            folder = Path(root, "study")
            faults.update(_codes([partial(ablate, folder)] * PROCESSES, Path(root), refusal=str(folder)))
            faults.update(_mixed(folder))
            with (folder / RESULTS).open(newline="") as file:
                faults["a row is missing or twice"] += len(list(csv.reader(file))) != 5
    return _row("16 studies in one folder: nothing overwritten", times, faults)


def runs(times: int) -> Row:
    """16 processes with the same single run and the same folder."""
    faults = Counter[str]()
    for _ in range(times):
        with tempfile.TemporaryDirectory() as root:
            folder = Path(root, "runs")
            faults.update(_codes([partial(_single, folder)] * PROCESSES, Path(root), refusal=str(folder)))
            faults.update(_mixed(folder))
    return _row("16 single runs in one folder: nothing overwritten", times, faults)


def apart(times: int) -> Row:
    """16 processes with folders of their own, side by side."""
    faults = Counter[str]()
    for _ in range(times):
        with tempfile.TemporaryDirectory() as root:
            folders = [Path(root, f"study_{number}") for number in range(PROCESSES)]
            faults.update(_codes([partial(ablate, folder) for folder in folders], Path(root), refusal=None))
            results = {(folder / RESULTS).read_bytes() for folder in folders}
            faults["results differ"] += len(results) != 1
    return _row("16 studies in folders of their own: all done, all alike", times, faults)


def _single(folder: Path) -> int:
    stubbed()
    return train_phase1.main(["--output_dir", str(folder), "--seed", "1", "--epochs", "1"])


def _codes(works: list[Callable[[], int]], root: Path, refusal: str | None) -> Counter[str]:
    """Start all of ``works`` at the same moment; who is refused says so in one line, and somebody gets through."""
    start = time.monotonic() + 0.3

    def at_once(work: Callable[[], int]) -> int:
        time.sleep(max(0.0, start - time.monotonic()))
        return work()

    said = [root / f"said_{number}.txt" for number in range(len(works))]
    processes = [forked(partial(at_once, work), file) for work, file in zip(works, said, strict=True)]
    codes = [ended(process) for process in processes]
    faults = Counter(nobody=codes.count(0) == 0)
    for code, file in zip(codes, said, strict=True):
        refused = [line for line in file.read_text().splitlines() if line.startswith("error: ")]
        clean = refusal and code == 1 and len(refused) == 1 and refusal in refused[0] and "is in use by" in refused[0]
        faults[f"exit code {code}: {file.read_text()[-100:]}"] += code != 0 and not clean
    return faults


def _mixed(folder: Path) -> Counter[str]:
    """What two processes have both had a hand in."""
    faults = Counter[str]()
    faults["a run was trained twice"] += max(Counter((folder / TRAININGS).read_text().splitlines()).values()) > 1
    for result in folder.rglob("result.json"):
        run = result.parent
        process = json.loads(result.read_text())["process"]
        with (run / "metrics.csv").open(newline="") as file:
            metrics = list(csv.DictReader(file))
        faults["metrics of two processes"] += {row["process"] for row in metrics} != {str(process)}
        faults["steps lost or twice"] += [int(row["step"]) for row in metrics] != list(STEPS)
        faults["another's checkpoint"] += (run / "checkpoint.pt").read_bytes() != process.to_bytes(8, "big") * 4096
        faults["files left"] += any(name.endswith((".tmp", "running")) for name in os.listdir(run))
    return faults


def _row(promise: str, times: int, faults: Counter[str]) -> Row:
    note = "; ".join(f"{fault} {count}x" for fault, count in faults.items() if count)
    return Row(promise, times * PROCESSES, faults.total(), note)
