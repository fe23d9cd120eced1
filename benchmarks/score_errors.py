"""The exact error of a diffusion model's score, bucket by bucket of noise levels, under every rule for them.

    python -m benchmarks.score_errors

Every run is `adaptive-loss train diffusion_2d --quick`; runs that are done are not done again. `tilted` arms start
from the customary weights λ(σₖ) times a power of ten that goes over the buckets from 1/10 (least noise) to 10: a wrong
λ(σ). The numbers are of the test points, at the last epoch.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaptive_loss.tasks import tasks
from adaptive_loss.utils.commands import command, parse
from adaptive_loss.utils.config import RunConfig
from benchmarks import arms as study

PROG = "python -m benchmarks.score_errors"
TASK = "diffusion_2d"
LEVEL_RULES = ("edm", "min_snr", "p2")
LEARNING_RULES = ("edm2_uncertainty", "inverse_ema")
DECADES = 2.0
"""From one end of the buckets to the other, of a tilt."""


@dataclass(frozen=True, kw_only=True)
class Flags(study.Flags):
    """The flags of the benchmark."""

    output_dir: Path = Path("results/score_errors")
    """Where the runs, table.csv and table.json go."""


def arms(flags: Flags) -> dict[str, RunConfig]:
    """By name, the runs to compare, their seed still open."""
    kind = tasks.get(TASK)
    common: dict[str, Any] = {
        "task": TASK,
        "dataset": kind.datasets[0],
        "data_dir": flags.data_dir,
        **kind.quick,
    }
    right, wrong = dict(kind.customary), tilted(kind.customary)
    levels = {rule: RunConfig(**common, weighting=rule) for rule in LEVEL_RULES}
    return {
        "uniform": RunConfig(**common),
        **levels,
        **_adapting(common, right, ""),
        "tilted fixed": RunConfig(**common, weights=wrong),
        **_adapting(common, wrong, "tilted "),
    }


def _adapting(common: Mapping[str, Any], weights: Mapping[str, float], prefix: str) -> dict[str, RunConfig]:
    """What moves the weights from a start: the rules that learn, the controller, and it above the first of them."""
    above = {"mode": "controller_only", "weighting": LEARNING_RULES[0]}
    return {
        **{prefix + rule: RunConfig(**common, weights=dict(weights), weighting=rule) for rule in LEARNING_RULES},
        f"{prefix}controller": RunConfig(**common, weights=dict(weights), mode="controller_only"),
        f"{prefix}controller above {LEARNING_RULES[0]}": RunConfig(**common, weights=dict(weights), **above),
    }


def tilted(weights: Mapping[str, float]) -> dict[str, float]:
    """``weights`` times 10^(−1 … 1) over the terms in their order.

    Example:
        >>> tilted({"bucket_0": 1.0, "bucket_1": 1.0, "bucket_2": 3.0})
        {'bucket_0': 0.1, 'bucket_1': 1.0, 'bucket_2': 30.0}
    """
    last = len(weights) - 1
    return {name: weight * 10 ** (DECADES * (i / last - 0.5)) for i, (name, weight) in enumerate(weights.items())}


def columns() -> study.Columns:
    """The eight buckets' errors and their mean."""
    names = [f"score_error_{k}" for k in range(len(tasks.get(TASK).terms))]
    return {name: study.column(name) for name in (*names, "loss")}


@command
def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    flags = parse(Flags, argv, PROG, "The exact score error a bucket of noise levels, under every rule for them.")
    return study.exit_code(study.conduct(PROG, argv, flags, arms(flags), columns()))


if __name__ == "__main__":
    sys.exit(main())
