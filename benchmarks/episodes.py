"""How many decisions a second stacked training runs give, against the same runs one at a time.

Both play :class:`adaptive_loss.meta.episodes.Episodes` with a controller below, forks and look-aheads included, at
random; stacked, N of them step as one. Both take turns, family by family, so that the ratio does not hang on what else
the machine does. Run from a checkout, some minutes on one core:

    python -m benchmarks.episodes --runs 32
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence

import torch

from adaptive_loss.meta.fleet import trained_families
from adaptive_loss.meta.problems import Problem
from adaptive_loss.meta.rollouts import rollout


def decisions_per_second(family: str, seeds: Sequence[int], steps: int) -> float:
    """Of one rollout, its making included."""
    begun = time.perf_counter()
    found = rollout(Problem(family, 1, tuple(seeds)), ("random",), steps=steps)
    return found.actions.numel() / (time.perf_counter() - begun)


def compare(runs: int, alone: int, steps: int) -> dict[str, dict[str, float]]:
    """Family → decisions a second stacked and one at a time, and their ratio; ``median`` is over the families."""
    found = {}
    for family in trained_families():
        decisions_per_second(family, [0], steps=20)  # what is only done once
        single = statistics.median(decisions_per_second(family, [seed], steps) for seed in range(alone))
        stacked = decisions_per_second(family, range(runs), steps)
        found[family] = {"stacked": stacked, "alone": single, "ratio": stacked / single}
    found["median"] = {"ratio": statistics.median(entry["ratio"] for entry in found.values())}
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Decisions a second, stacked and one at a time.")
    parser.add_argument("--runs", type=int, default=32, help="runs that are stacked")
    parser.add_argument("--alone", type=int, default=3, help="runs one at a time, of which the median counts")
    parser.add_argument("--steps", type=int, default=150, help="length of the runs")
    parser.add_argument("--json", action="store_true", help="print JSON")
    flags = parser.parse_args(argv)
    torch.set_num_threads(1)
    found = compare(flags.runs, flags.alone, flags.steps)
    if flags.json:
        print(json.dumps(found))
        return 0
    for family, entry in found.items():
        print(f"{family:<16}" + "  ".join(f"{name} {value:.1f}" for name, value in entry.items()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
