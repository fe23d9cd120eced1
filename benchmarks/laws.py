"""The controller's law against the look-ahead rule, and both against start weights held, on fresh small problems.

Problems are those that the controller is meta-trained on (a classifier with helpful and harmful auxiliaries, a VAE, a
regression), from seeds that no meta-training reaches; start weights are wrong by up to a hundred times either way. The
numbers are mean log-ratios of final losses, clipped to ±1 a problem, with BCa intervals; below 0 is better.

Run from a checkout, a few minutes on two cores:

    python -m benchmarks.laws --problems 120
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence

from adaptive_loss.meta.costs import draw_problems, one_thread_log_finals
from adaptive_loss.meta_controller import CLIMB, RULE, ZERO
from adaptive_loss.trainer.simple_ablation_analysis import bca_interval
from adaptive_loss.utils.config import core_count

FIRST_SEED = 2_000_000
LAWS = {"law": CLIMB, "rule": RULE, "held": ZERO}
PAIRS = (("law", "rule"), ("law", "held"), ("rule", "held"))


def compare(problems: int) -> dict[str, dict[str, dict[str, object]]]:
    """Pair of laws → family (or ``all``) → number, mean log-ratio and its interval."""
    from joblib import Parallel, delayed

    drawn = draw_problems(problems, FIRST_SEED)
    run = Parallel(n_jobs=core_count())
    laws = list(LAWS.values())
    finals: list[list[float]] = list(run(delayed(one_thread_log_finals)(laws, p) for p in drawn))  # pyright: ignore
    found = {}
    for one, other in PAIRS:
        places = [list(LAWS).index(name) for name in (one, other)]
        groups: dict[str, list[float]] = {"all": []}
        for (family, _), values in zip(drawn, finals, strict=True):
            ratio = max(-1.0, min(1.0, values[places[0]] - values[places[1]]))
            groups["all"].append(ratio)
            groups.setdefault(family, []).append(ratio)
        found[f"{one} over {other}"] = {name: _summary(ratios) for name, ratios in groups.items()}
    return found


def _summary(ratios: list[float]) -> dict[str, object]:
    return {"n": len(ratios), "mean_log_ratio": statistics.fmean(ratios), "interval95": bca_interval(ratios)}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="The controller's law, the look-ahead rule and held weights.")
    parser.add_argument("--problems", type=int, default=120, help="fresh problems, spread over the families")
    parser.add_argument("--json", action="store_true", help="print JSON")
    flags = parser.parse_args(argv)
    if flags.problems < 6:
        parser.error(f"--problems is {flags.problems}; give at least 6, two a family")
    found = compare(flags.problems)
    if flags.json:
        print(json.dumps(found))
        return 0
    for pair, groups in found.items():
        for family, entry in groups.items():
            low, high = entry["interval95"] or (float("nan"), float("nan"))  # type: ignore[misc]
            print(f"{pair:<16}{family:<14}{entry['n']:>4}  {entry['mean_log_ratio']:+.3f} [{low:+.3f}, {high:+.3f}]")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
