"""The search for a task's best fixed weights: ``adaptive-loss tune vae --trials 24``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from adaptive_loss.errors import UsageError
from adaptive_loss.trainer import plan
from adaptive_loss.trainer.progress import Progress
from adaptive_loss.trainer.studies import check_folders, worker_count
from adaptive_loss.trainer.study import ManyFlags, check_settings, prepare
from adaptive_loss.trainer.task_flags import TaskFlags, completed
from adaptive_loss.trainer.tuning import Search, search_for
from adaptive_loss.utils.commands import command, parse
from adaptive_loss.utils.config import validate

PROG = "adaptive-loss tune"
SHOWN = 5
"""Trials that the table shows."""


@dataclass(frozen=True, kw_only=True)
class Flags(TaskFlags, ManyFlags):
    """The flags of the search."""

    trials: int = 24
    """Full-length runs, each with its own fixed weights; more of them go on with a search that is done."""


@command
def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    about = "Search a task's best fixed weights on its select split: what `tuned` means in every study."
    flags = completed(parse(Flags, argv, PROG, about), "tune")
    search = _checked(flags)
    if flags.dry_run:
        return plan.show(search.specs(), flags.jobs, flags.json)
    ended = search.ended()
    if ended < search.trials:
        prepare(flags)
    with Progress(search.trials, ended) as progress:
        search.run(flags.jobs, on_row=progress.done)
    print(search.file.read_text(encoding="utf-8").rstrip() if flags.json else describe(search))
    return 0


def _checked(flags: Flags) -> Search:
    """The search that is asked for, once everything is ruled out that can be known to be wrong before its first run."""
    if flags.trials < 1:
        raise UsageError(f"--trials is {flags.trials}; give at least 1")
    worker_count(flags.jobs)
    check_settings(flags)
    search = search_for(flags, flags.output_dir, flags.trials)
    validate(search.base)
    check_folders(search.specs())
    return search


def describe(search: Search) -> str:
    """The best trials as plain text."""
    ranked = search.ranked()
    lines = [f"{'trial':<12}{'select ' + search.metric:<20}weights"]
    for record in ranked[:SHOWN]:
        weights = ", ".join(f"{name} {weight:.4g}" for name, weight in record["weights"].items())
        lines.append(f"{record['trial']:<12}{record[f'select_{search.metric}']:<20.6g}{weights}")
    failed = search.trials - len(ranked)
    lines += ["", f"the best of {search.trials} trials" + (f", {failed} of them failed" if failed else "")]
    return "\n".join([*lines, f"written: {search.file}; `adaptive-loss compare --tuned` takes it"])


if __name__ == "__main__":
    sys.exit(main())
