"""Phase 1: fixed start weights against the adaptive system as it ships, over several seeds.

python -m adaptive_loss.trainer.run_phase1_experiments --seeds 1 42 123 --epochs 30 --output results/phase1_results.csv
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from adaptive_loss.trainer.arms import mode_arm
from adaptive_loss.trainer.study import Study, StudyFlags, run_study
from adaptive_loss.utils.commands import command, command_line, parse

MODES = ("baseline", "adaptive")
PROG = "adaptive-loss phase1"


@dataclass(frozen=True, kw_only=True)
class Flags(StudyFlags):
    """The flags of phase 1."""

    epochs: int = 30
    """Passes over the training split."""
    output: Path = Path("results/phase1_results.csv")
    """The results file; the runs go to a folder of the same stem beside it."""


@command
def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    flags = parse(Flags, argv, PROG, "Train with fixed and with adaptive weights over several seeds.")
    folder = flags.output.parent / flags.output.stem
    line = command_line(PROG, argv)
    arms = tuple(map(mode_arm, MODES))
    return run_study(Study(flags, arms, flags.seeds, flags.output, folder, argv=line), flags)


if __name__ == "__main__":
    sys.exit(main())
