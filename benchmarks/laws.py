"""The controller's law against the look-ahead rule, and both against start weights held, on fresh small runs.

Runs are of the seven families that policies are trained on, from seeds that no training reaches; start weights are
wrong by up to ten times either way. The numbers are mean log-ratios of final losses, clipped to ±1 a run, with BCa
intervals; below 0 is better. Run from a checkout, a few minutes on two cores:

    python -m benchmarks.laws --runs 16
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from adaptive_loss.meta.costs import one_thread_log_finals
from adaptive_loss.meta.fleet import STEPS, trained_families
from adaptive_loss.meta.problems import draw_problems, summarised
from adaptive_loss.meta_controller import CLIMB, RULE
from adaptive_loss.utils.config import core_count

FIRST_SEED = 2_000_000
LAWS = {"law": CLIMB, "rule": RULE, "held": None}
PAIRS = (("law", "rule"), ("law", "held"), ("rule", "held"))


def compare(runs: int, draws: int = 2) -> dict[str, dict[str, dict[str, Any]]]:
    """Pair of laws → family (or ``all``) → number, mean log-ratio and its interval."""
    from joblib import Parallel, delayed

    problems, laws = draw_problems(trained_families(), runs, FIRST_SEED, draws), list(LAWS.values())
    workers = Parallel(n_jobs=core_count())
    finals: Any = list(workers(delayed(one_thread_log_finals)(laws, problem, STEPS) for problem in problems))
    found = {}
    for one, other in PAIRS:
        places = [list(LAWS).index(name) for name in (one, other)]
        groups: dict[str, list[float]] = {}
        for problem, values in zip(problems, finals, strict=True):
            mine, theirs = (values[place] for place in places)
            ratios = [max(-1.0, min(1.0, a - b)) for a, b in zip(mine, theirs, strict=True)]
            groups.setdefault(problem.family, []).extend(ratios)
        found[f"{one} over {other}"] = summarised(groups)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="The controller's law, the look-ahead rule and held weights.")
    parser.add_argument("--runs", type=int, default=16, help="fresh runs of each family and draw")
    parser.add_argument("--json", action="store_true", help="print JSON")
    flags = parser.parse_args(argv)
    if flags.runs < 2:
        parser.error(f"--runs is {flags.runs}; give at least 2")
    found = compare(flags.runs)
    if flags.json:
        print(json.dumps(found))
        return 0
    for pair, groups in found.items():
        for family, entry in groups.items():
            low, high = entry["interval95"] or (float("nan"), float("nan"))
            print(f"{pair:<16}{family:<16}{entry['n']:>4}  {entry['mean']:+.3f} [{low:+.3f}, {high:+.3f}]")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
