"""One run of any task: ``adaptive-loss train vae --adaptive --output-dir results/vae``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from adaptive_loss.errors import UsageError
from adaptive_loss.trainer.arms import mode_name
from adaptive_loss.trainer.single import SingleFlags, run_single
from adaptive_loss.trainer.task_flags import TaskFlags, completed
from adaptive_loss.utils.commands import command, parse

PROG = "adaptive-loss train"


@dataclass(frozen=True, kw_only=True)
class Flags(TaskFlags, SingleFlags):
    """The flags of one run of a task."""

    adaptive: bool = False
    """Short for --mode adaptive: the system as it ships."""
    mode: str | None = None
    """What adapts the weights: a file name in adaptive_loss/modes; baseline where neither is given."""


@command
def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    flags = parse(Flags, argv, PROG, "Train one task once.")
    if flags.adaptive and flags.mode is not None:
        raise UsageError("--adaptive and --mode exclude each other; give one of them")
    mode = "adaptive" if flags.adaptive else mode_name(flags.mode or "baseline", "--mode")
    return run_single(completed(flags, "train"), mode)


if __name__ == "__main__":
    sys.exit(main())
