"""Determinism: the same command twice, in processes with different hash seeds, gives the same bytes."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.reliability.rows import Row

ROOT = Path(__file__).parents[2]
TIMING = {"train_seconds", "steps_per_second", "peak_memory_mb", "provenance"}
STUDIES = (
    ["--modes", "baseline", "full"],
    ["--modes", "monitor_only", "random_monitor"],
    ["--modes", "controller_only", "lookahead_only"],
    ["--modes", "baseline", "--weighting", "gradnorm"],
    ["--modes", "full", "--task", "vae"],
)


def torture(number: int = 20) -> Row:
    """20 pairs of processes over five studies."""
    return pairs(number)


def pairs(number: int) -> Row:
    """Do ``number`` small studies twice each and compare what they wrote, timing and provenance left out."""
    different: list[str] = []
    for pair in range(number):
        flags = [*STUDIES[pair % len(STUDIES)], "--seeds", str(pair)]
        with tempfile.TemporaryDirectory() as root:
            first, second = (_study(Path(root, name), flags, 1 + 2 * pair + n) for n, name in enumerate("ab"))
        unlike = [name for name in sorted(first | second) if first.get(name) != second.get(name)]
        different += [f"{name} with {' '.join(flags)}" for name in unlike]
    return Row("determinism: the same bytes under other hash seeds", number, len(different), "; ".join(different))


def _study(folder: Path, flags: list[str], hash_seed: int) -> dict[str, Any]:
    """The files of a study of one epoch on a few digits, by name, without what a clock says."""
    command = [sys.executable, "-m", "adaptive_loss", "ablate", "--dataset", "digits", "--subset", "400", *flags]
    command += ["--epochs", "2", "--batch_size", "50", "--jobs", "1", "--output_dir", str(folder)]
    environment = {**os.environ, "PYTHONHASHSEED": str(hash_seed)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"command": done.stderr[-200:], "hash seed": hash_seed}
    kinds = {".csv": _csv, ".json": _json, ".jsonl": Path.read_bytes}
    files = [file for file in folder.rglob("*") if file.suffix in kinds and file.name != "ledger.jsonl"]
    return {str(file.relative_to(folder)): kinds[file.suffix](file) for file in files}


def _csv(file: Path) -> list[str]:
    with file.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    return [json.dumps({name: cell for name, cell in row.items() if name not in TIMING}) for row in rows]


def _json(file: Path) -> str:
    return json.dumps(_timeless(json.loads(file.read_text())))


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _timeless(item) for name, item in value.items() if name not in TIMING}
    return [_timeless(item) for item in value] if isinstance(value, list) else value
