"""One run of any task: ``adaptive-loss train vae --adaptive --output-dir results/vae``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from adaptive_loss.errors import UsageError
from adaptive_loss.trainer.single import SingleFlags, run_single
from adaptive_loss.trainer.study import mode_name
from adaptive_loss.utils.commands import command, parse

PROG = "adaptive-loss train"


@dataclass(frozen=True, kw_only=True)
class Flags(SingleFlags):
    """The flags of one run of a task."""

    task: tyro.conf.Positional[str] = "classify"
    """What is learned: a file name in adaptive_loss/tasks."""
    dataset: str = ""
    """What it is learned on, a file name in adaptive_loss/data; the task's own first where none is given."""
    adaptive: bool = False
    """Short for --mode full: the whole adaptive system."""
    mode: str | None = None
    """What adapts the weights: a file name in adaptive_loss/modes; baseline where neither is given."""
    quick: bool = False
    """The task's short form, a minute at most; flags given beside it stay."""
    smoke: bool = False
    """The task's shortest form, to see that it runs."""


@command
def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    flags = parse(Flags, argv, PROG, "Train one task once.")
    if flags.adaptive and flags.mode is not None:
        raise UsageError("--adaptive and --mode exclude each other; give one of them")
    if flags.quick and flags.smoke:
        raise UsageError("--quick and --smoke exclude each other; give one of them")
    mode = "full" if flags.adaptive else mode_name(flags.mode or "baseline", "--mode")
    if flags.output_dir == Flags.output_dir:  # two tasks must not meet in one folder
        flags = replace(flags, output_dir=Path(f"results/train_{flags.task}"))
    return run_single(_shortened(flags), mode)


def _shortened(flags: Flags) -> Flags:
    """``flags`` with the task's own dataset, or settings of ``--quick`` and ``--smoke``, where none were given."""
    from adaptive_loss.tasks import tasks

    kind = tasks.get(flags.task)
    form = kind.smoke if flags.smoke else kind.quick if flags.quick else {}
    own = {"dataset": kind.datasets[0], **form}
    return replace(flags, **{name: own[name] for name in own if getattr(flags, name) == getattr(Flags, name)})


if __name__ == "__main__":
    sys.exit(main())
