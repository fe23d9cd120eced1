"""Kill at any moment: a study's files after ``SIGKILL`` between every open, write, fsync and rename, and at random."""

from __future__ import annotations

import csv
import json
import os
import random
import re
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from adaptive_loss.errors import RunError
from adaptive_loss.ledger import FILE_NAME, record_of
from adaptive_loss.records import read_results
from tests.reliability.rows import Row
from tests.reliability.stub_study import TRAININGS, ablate, counting, ended, forked

Key = tuple[str, int]
RESULTS = "ablation_results.csv"


def torture(kills: int = 200) -> Row:
    """200 kills, each followed by an inspection, and the same command until the study is done."""
    return killed(kills)


def killed(kills: int, seed: int = 0) -> Row:
    """Kill a study ``kills`` times, evenly over its calls, every fifth by the clock; every second study twice."""
    dice, faults, done, attempts, acknowledged = random.Random(seed), Counter[str](), 0, 0, 0
    with tempfile.TemporaryDirectory() as root:
        reference = Path(root, "reference")
        points = _points(reference)
        while done < kills:
            folder = Path(root, f"study_{attempts}")
            for _ in range(1 + attempts % 2):
                after_s = dice.uniform(0.0, 0.3) if attempts % 5 == 4 else None
                code = _kill(folder, after_s, 1 + done * points // kills % points)
                faults["could not go on"] += code not in (0, -signal.SIGKILL)
                done += code == -signal.SIGKILL
                faults.update(_inspect(folder))
            acknowledged += len(_acknowledged(folder))
            faults.update(_finish(folder, reference))
            attempts += 1
    found = [f"{fault} {count}x" for fault, count in faults.items() if count]
    note = "; ".join([f"{points} calls reach the disk, {acknowledged} rows were acknowledged before a kill", *found])
    return Row("kill at any moment, a study: nothing unreadable, lost or twice", done, faults.total(), note)


def _points(folder: Path) -> int:
    """How many calls of a whole study reach the disk."""
    counted = folder.with_name("points.txt")
    work = partial(counting, partial(ablate, folder), None, lambda count: counted.write_text(str(count)) and None)
    assert ended(forked(work, folder.with_name("said.txt"))) == 0, folder.with_name("said.txt").read_text()
    return int(counted.read_text())


def _kill(folder: Path, after_s: float | None, point: int) -> int:
    """Run the study's command and kill it after a time or before a call that reaches the disk; its exit code."""
    said = folder.with_name(f"{folder.name}.txt")
    work = partial(ablate, folder)
    process = forked(partial(counting, work, None if after_s is not None else point), said)
    if after_s is not None:
        time.sleep(after_s)
        os.kill(process, signal.SIGKILL)
    return ended(process)


def _inspect(folder: Path) -> Iterator[str]:
    """What is wrong with the files that a killed study left."""
    for file in folder.rglob("*.json") if folder.exists() else ():
        try:
            json.loads(file.read_text())
        except ValueError:
            yield f"{file.name} unreadable"
    try:
        held = (
            {(row.mode, row.seed) for row in read_results(folder / RESULTS)} if (folder / RESULTS).exists() else set()
        )
    except RunError:
        yield "results unreadable"
        return
    for key in _acknowledged(folder):
        if key not in held:
            yield "acknowledged row not in the results"
        if key not in _in_ledger(folder):
            yield "acknowledged row not in the ledger"


def _finish(folder: Path, reference: Path) -> Iterator[str]:
    """What is wrong after the same command has run to its end."""
    before = Counter(_trainings(folder))
    acknowledged = _acknowledged(folder)
    said = folder.with_name(f"{folder.name}.txt")
    if ended(forked(partial(ablate, folder), said)) != 0:
        yield f"could not go on: {said.read_text()[-100:]}"
        return
    if (folder / RESULTS).read_bytes() != (reference / RESULTS).read_bytes():
        yield "results differ from an undisturbed study's"
    if any(Counter(_trainings(folder))[key] != before[key] for key in acknowledged):
        yield "acknowledged run done again"
    yield from ("leftover file" for _ in folder.rglob("*.tmp"))
    for file in folder.rglob("metrics.csv"):
        steps = [row["step"] for row in csv.DictReader(file.read_text().splitlines())]
        if steps != ["1", "2"]:
            yield "steps lost or twice"


def _acknowledged(folder: Path) -> set[Key]:
    """The runs that the command said were done."""
    said = folder.with_name(f"{folder.name}.txt").read_text()
    return {(mode, int(seed)) for mode, seed in re.findall(r"^\[\d+/\d+\] (\w+) seed (\d+): ok", said, re.MULTILINE)}


def _in_ledger(folder: Path) -> set[Key]:
    records = [record_of(line) for line in (folder / FILE_NAME).read_bytes().splitlines(keepends=True)]
    rows = [record["row"] for record in records if record is not None and record["kind"] == "row"]
    return {(row["mode"], row["seed"]) for row in rows}


def _trainings(folder: Path) -> list[Key]:
    file = folder / TRAININGS
    lines = file.read_text().splitlines() if file.exists() else []
    return [(mode, int(seed)) for mode, seed in (line.split() for line in lines)]
