"""What can be derived, derived again: ``adaptive-loss rebuild results/ablation_study``.

A study's csv and json come from its ledger, a run's TensorBoard files from the ``scalars.jsonl`` beside them.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from adaptive_loss import ledger
from adaptive_loss.errors import RunError, UsageError
from adaptive_loss.locks import RUNNING, run_lock
from adaptive_loss.utils.commands import command, parse
from adaptive_loss.utils.logging import SCALARS

PROG = "adaptive-loss rebuild"
NEW = ".tb.new"


@dataclass(frozen=True, kw_only=True)
class Flags:
    """The flags of the rebuilding."""

    folder: tyro.conf.Positional[Path]
    """A study's folder, or a run's."""
    json: bool = False
    """Print what was written as one JSON document."""


def rebuild(folder: Path) -> list[Path]:
    """Derive again what the study or the run in ``folder`` derives; the files and folders written.

    Raises:
        UsageError: the folder holds neither, or the results' place is taken by somebody else's file.
        RunError: another process is at it, or what it would be derived from is damaged.
    """
    runs = [file.parents[1] for file in sorted(folder.rglob(SCALARS))]
    if not runs and not (folder / ledger.FILE_NAME).is_file():
        raise UsageError(f"{folder} holds neither {ledger.FILE_NAME} nor {SCALARS}; name a study's folder or a run's")
    return [*_results(folder), *(curves(run) for run in runs)]


def _results(folder: Path) -> list[Path]:
    if not (folder / ledger.FILE_NAME).is_file():
        return []
    _check_no_links(folder, (ledger.FILE_NAME,))
    with ledger.Ledger(folder) as book:
        files = [book.output, book.output.with_suffix(".json")]
        for file in files:
            if file.exists() and not _is_results(files[1]):
                raise UsageError(f"{file} is in the way and no study's; move it away")
        book.write_results()
    return files


def _is_results(file: Path) -> bool:
    """Whether ``file`` is the json of a study's results; damaged results may be replaced only by hand."""
    try:
        return {"config", "rows", "summary"} <= set(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        return False


def curves(run: Path) -> Path:
    """Replace the TensorBoard files of a run's folder by what ``tb/scalars.jsonl`` says; the folder ``tb``.

    Every scalar is there again with its step; the times of day are new. Images are not: they are in ``pictures/``.

    Raises:
        RunError: another process is at this run, or a line is damaged.
    """
    from torch.utils.tensorboard import SummaryWriter

    tb = (run / SCALARS).parent
    _check_no_links(run, (tb.name, SCALARS, RUNNING, NEW))
    with run_lock(run):
        shutil.rmtree(run / NEW, ignore_errors=True)
        with SummaryWriter(str(run / NEW)) as writer:
            for step, values in read_scalars(run / SCALARS):
                for tag, value in values.items():
                    writer.add_scalar(tag, value, step)
        for old in tb.glob("events.out.tfevents.*"):
            old.unlink()
        for new in (run / NEW).iterdir():
            new.rename(tb / new.name)
        (run / NEW).rmdir()
    return tb


def _check_no_links(folder: Path, names: Sequence[str]) -> None:
    """A folder may come from anyone: what is written must stay in it."""
    for name in names:
        if (folder / name).is_symlink():
            raise UsageError(f"{folder / name} is a link to another place; put the file itself there")


def read_scalars(path: Path) -> Iterator[tuple[int, dict[str, float]]]:
    """The steps and values of a ``scalars.jsonl``; a last line torn by a kill is left out.

    Raises:
        RunError: a line is damaged; the message names it.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                record = json.loads(line)
                step, values = int(record["step"]), {str(t): float(v) for t, v in record["values"].items()}
            except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
                step, values = -1, {}
            if not 0 <= step < 2**63 or not all(map(math.isfinite, values.values())):
                raise RunError(f"{path}: line {number} is damaged; take it out, or do that run again")
            yield step, values


@command
def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    flags = parse(Flags, argv, PROG, "Derive a study's results and the TensorBoard files again from what was logged.")
    files = [str(file) for file in rebuild(flags.folder)]
    print(json.dumps({"files": files}) if flags.json else "\n".join(f"written: {file}" for file in files))
    return 0


if __name__ == "__main__":
    sys.exit(main())
