"""One phase-1 run: fixed start weights, or with ``--adaptive`` the adaptive system as it ships.

python -m adaptive_loss.trainer.train_phase1 --adaptive --epochs 30 --seed 42 --logdir results/train_phase1
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from adaptive_loss.trainer.single import SingleFlags, run_single
from adaptive_loss.utils.commands import command, parse


@dataclass(frozen=True, kw_only=True)
class Flags(SingleFlags):
    """The flags of one phase-1 run."""

    adaptive: bool = False
    """Adapt the weights while training; without it they stay at their start."""
    output_dir: Annotated[Path, tyro.conf.arg(aliases=("--logdir",))] = Path("results/train_phase1")
    """Where the run's folder <mode>/seed_<seed> goes; --logdir is the same."""


@command
def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    flags = parse(Flags, argv, "train_phase1", "Train once, with fixed weights or with adaptive ones.")
    return run_single(flags, "adaptive" if flags.adaptive else "baseline")


if __name__ == "__main__":
    sys.exit(main())
