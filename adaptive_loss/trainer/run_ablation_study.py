"""The ablation: each component alone, both together, and the controls that nobody should win against by accident.

python -m adaptive_loss.trainer.run_ablation_study --seeds 1 42 123 456 789 --output_dir results/ablation_study
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from adaptive_loss.trainer.arms import Arm, mode_arm, mode_name
from adaptive_loss.trainer.simple_ablation_analysis import CONTROLS, FILE_NAME, MODES
from adaptive_loss.trainer.study import Study, StudyFlags, run_study
from adaptive_loss.utils.commands import command, command_line, parse

PROG = "adaptive-loss ablate"


@dataclass(frozen=True, kw_only=True)
class Flags(StudyFlags):
    """The flags of the ablation."""

    seeds: tuple[int, ...] = (1, 42, 123, 456, 789)
    """Seeds; every mode runs each of them, paired."""
    modes: tuple[str, ...] = MODES
    """The arms to compare; full_adaptive is another name of full."""
    controls: bool = False
    """Add the controls: base_only base_only_all tuned random_monitor lookahead_only."""
    trials: int = 24
    """Runs of the weight search behind the control `tuned`."""
    output_dir: Path = Path("results/ablation_study")
    """Where the results and the runs go."""


@command
def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    flags = parse(Flags, argv, PROG, "Compare the adaptive system's components with fixed weights and with controls.")
    line = command_line(PROG, argv)
    output = flags.output_dir / FILE_NAME
    return run_study(Study(flags, arms(flags), flags.seeds, output, flags.output_dir, flags.trials, line), flags)


def arms(flags: Flags) -> tuple[Arm, ...]:
    """The modes to run, by their own names, and the controls that are not among them already."""
    asked = tuple(mode_name(mode, "--modes") for mode in flags.modes)
    controls = tuple(mode for mode in CONTROLS if flags.controls and mode not in asked)
    return tuple(map(mode_arm, asked + controls))


if __name__ == "__main__":
    sys.exit(main())
