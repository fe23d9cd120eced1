"""One run of the ablation, in the mode that ``--ablation_mode`` names.

python -m adaptive_loss.trainer.train_ablation --ablation_mode monitor_only --epochs 25 --seed 42
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from adaptive_loss.trainer.arms import mode_name
from adaptive_loss.trainer.single import SingleFlags, run_single
from adaptive_loss.utils.commands import command, parse


@dataclass(frozen=True, kw_only=True)
class Flags(SingleFlags):
    """The flags of one run of the ablation."""

    ablation_mode: str = "full"
    """What adapts the weights: baseline, monitor_only, controller_only, full, or a control."""
    output_dir: Annotated[Path, tyro.conf.arg(aliases=("--logdir",))] = Path("results/train_ablation")
    """Where the run's folder <mode>/seed_<seed> goes; --logdir is the same."""


@command
def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    flags = parse(Flags, argv, "train_ablation", "Train once in one mode of the ablation.")
    return run_single(flags, mode_name(flags.ablation_mode, "--ablation-mode"))


if __name__ == "__main__":
    sys.exit(main())
