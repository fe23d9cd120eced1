"""Collapses at the switch-on of an adversarial term whose weight is ten times the customary one.

    python -m benchmarks.switch_on

Every run is `adaptive-loss train vqgan --quick`; runs that are done are not done again. The term comes at a quarter of
the run. A run has collapsed where the reconstruction on the select split has been, at the end of any epoch since, more
than half above its last value before: the bound at which the rule `switch_on` takes the term back.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaptive_loss.tasks import tasks
from adaptive_loss.utils.commands import command, parse
from adaptive_loss.utils.config import RunConfig
from benchmarks import arms as study

PROG = "python -m benchmarks.switch_on"
FACTOR, BOUND = 10.0, 0.5
COLUMNS: study.Columns = {
    "jump": lambda row: row["select_switch_on_jump"],
    "reconstruction": study.column("reconstruction"),
    "psnr": study.column("psnr"),
    "own_kid": study.column("own_kid"),
    "last_weight": lambda row: row["weights"]["final"]["adversarial"],
}


@dataclass(frozen=True, kw_only=True)
class Flags(study.Flags):
    """The flags of the benchmark."""

    seeds: tuple[int, ...] = tuple(range(1, 11))
    """Seeds; every arm runs each of them, paired."""
    output_dir: Path = Path("results/switch_on")
    """Where the runs, table.csv and table.json go."""


def arms(flags: Flags) -> dict[str, RunConfig]:
    """By name, the runs to compare, their seed still open."""
    kind = tasks.get("vqgan")
    weights = {**kind.customary, "adversarial": FACTOR * kind.customary["adversarial"]}
    common: dict[str, Any] = {"task": "vqgan", "dataset": kind.datasets[0], "data_dir": flags.data_dir, **kind.quick}
    return {
        "fixed": RunConfig(**common, weights=weights),
        "controller": RunConfig(**common, weights=weights, mode="controller_only"),
        "switch_on": RunConfig(**common, weights=weights, weighting="switch_on"),
    }


def share_interval(hits: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Clopper and Pearson's exact interval of a share of which ``hits`` of ``n`` were seen.

    Example:
        >>> tuple(round(end, 3) for end in share_interval(0, 10))
        (0.0, 0.308)
    """
    tail = (1 - level) / 2
    return 1 - _greatest_share(n - hits, n, tail), _greatest_share(hits, n, tail)


def _greatest_share(hits: int, n: int, tail: float) -> float:
    """The p at which ``hits`` of ``n`` or fewer have a probability of ``tail``; 1 where all are hits."""
    low, high = hits / n, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        fewer = math.fsum(math.comb(n, k) * middle**k * (1 - middle) ** (n - k) for k in range(hits + 1))
        low, high = (middle, high) if hits < n and fewer > tail else (low, middle)
    return high if hits < n else 1.0


def counts(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line an arm: collapsed and failed runs of all, with the exact interval."""
    lines = []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        own = [row for row in rows if row["arm"] == arm]
        hits = sum(row["status"] != "ok" or row["jump"] > BOUND for row in own)
        low, high = share_interval(hits, len(own))
        lines.append(f"{arm}: {hits} of {len(own)} collapsed or failed, 95% of the share [{low:.2f}, {high:.2f}]")
    return "\n".join(lines)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    flags = parse(Flags, argv, PROG, "Collapses at the switch-on of an adversarial term ten times too heavy.")
    rows = study.conduct(PROG, argv, flags, arms(flags), COLUMNS)
    print(counts(rows))
    return study.exit_code(rows)


if __name__ == "__main__":
    sys.exit(main())
