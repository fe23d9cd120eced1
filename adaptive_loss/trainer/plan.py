"""What a command would do: the runs, which are done, the time they will take and the disk."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from adaptive_loss.trainer.studies import Spec, check_folders, finished, worker_count


def plan(specs: Sequence[Spec], jobs: int) -> dict[str, Any]:
    """The runs of ``specs`` with their state, and the time and disk of the rest, measured from those done."""
    check_folders(specs)
    rows = [finished(spec) for spec in specs]
    seconds = [row["train_seconds"] for row in rows if row and isinstance(row.get("train_seconds"), (int, float))]
    sizes = [_size(spec.folder) for spec, row in zip(specs, rows, strict=True) if row]
    todo = rows.count(None)
    workers = max(1, min(worker_count(jobs), todo))
    return {
        "runs": [_run(spec, row is not None) for spec, row in zip(specs, rows, strict=True)],
        "done": len(rows) - todo,
        "to_do": todo,
        "jobs": workers,
        "seconds_left": fmean(seconds) * todo / workers if seconds else None,
        "bytes_needed": round(fmean(sizes) * todo) if sizes else None,
        "bytes_free": shutil.disk_usage(_existing(specs[0].folder)).free,
    }


def show(specs: Sequence[Spec], jobs: int, as_json: bool) -> int:
    """Print the plan; the exit code."""
    result = plan(specs, jobs)
    print(json.dumps(result, indent=2) if as_json else describe(result))
    return 0


def describe(result: dict[str, Any]) -> str:
    """A plan as plain text: a line a mode, then what is left."""
    marks: dict[str, list[str]] = {}
    for run in result["runs"]:
        label = "tuned, trials" if run["mode"].startswith("trial_") else run["mode"]
        marks.setdefault(label, []).append(f"{run['seed']} {'done' if run['done'] else 'to do'}")
    lines = [f"{label:<18}{_seeds(label, states)}" for label, states in marks.items()]
    seconds, needed = result["seconds_left"], result["bytes_needed"]
    time = "unknown until a run is done" if seconds is None else f"about {seconds / 60:.1f} min"
    disk = "unknown until a run is done" if needed is None else f"about {needed / 1e6:.1f} MB"
    lines += ["", f"runs   {result['to_do']} to do, {result['done']} done, {result['jobs']} at a time"]
    return "\n".join([*lines, f"time   {time}", f"disk   {disk}, {result['bytes_free'] / 1e9:.1f} GB free"])


def _seeds(label: str, states: Sequence[str]) -> str:
    if label == "tuned, trials":
        return f"{len(states)} runs, {sum(state.endswith('done') for state in states)} done"
    return "seed " + ", ".join(states)


def _run(spec: Spec, done: bool) -> dict[str, Any]:
    return {"mode": spec.label, "seed": spec.config.seed, "folder": str(spec.folder), "done": done}


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _existing(folder: Path) -> Path:
    """The nearest folder that is there, to ask the disk of."""
    return next(part for part in (folder, *folder.parents, Path(".")) if part.exists())
