"""How much of what wrong weights cost an arm wins back: the gap recovered, with its interval."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

from adaptive_loss.trainer.simple_ablation_analysis import paired

Rows = Sequence[Mapping[str, Any]]

_RESAMPLES = 10_000


def recovery(arm: Rows, start: Rows, tuned: Rows, metric: str) -> dict[str, Any]:
    """(arm − start)/(tuned − start), of means over the seeds that finished in all three, and what it is made of.

    1 is as good as tuning, 0 as bad as the start, below 0 harm. The ratio is given only where the interval of its
    denominator lies above 0: over a gap that may be none it is noise, and tuned weights that are worse than the start
    are no measure; the paired difference then says more.

    Args:
        arm, start, tuned: rows of the arm, of its start weights held, and of tuned weights held.
        metric: the column that is judged; lower is better, but for an accuracy.

    Returns:
        ``gain`` and ``gain95``, by how much the arm is better than its start (accuracies in percentage points);
        ``gap`` and ``gap95``, the same of tuned; ``recovered`` and ``recovered95``, percentile bootstrap over seeds.
        ``None`` for what does not exist.

    Example:
        >>> rows = lambda *losses: [{"seed": i, "status": "ok", "test_loss": x} for i, x in enumerate(losses)]
        >>> found = recovery(rows(2, 3, 2), rows(4, 5, 4.5), rows(2, 2.5, 2), "test_loss")
        >>> round(found["gain"], 3), round(found["gap"], 3), round(found["recovered"], 3)
        (2.167, 2.333, 0.929)
    """
    gain, gap = (_improvement(rows, start, metric) for rows in (arm, tuned))
    found = {"gain": gain[0], "gain95": gain[1], "gap": gap[0], "gap95": gap[1]}
    if gap[1] is None or gap[1][0] <= 0:
        return {**found, "recovered": None, "recovered95": None}
    values = [_by_seed(rows, metric) for rows in (arm, start, tuned)]
    seeds = sorted(set.intersection(*(set(column) for column in values)))
    if not seeds:
        return {**found, "recovered": None, "recovered95": None}
    triples = [tuple(column[seed] for column in values) for seed in seeds]
    return {**found, "recovered": _ratio(triples), "recovered95": _interval(triples)}


def interquartile_mean(values: Sequence[float]) -> float | None:
    """Mean of the middle half, quarters at the ends counted in part; ``None`` of nothing.

    Example:
        >>> interquartile_mean([0, 1, 1, 100]), interquartile_mean([1, 2])
        (1.0, 1.5)
    """
    if not values:
        return None
    ordered, cut = sorted(values), len(values) / 4
    parts = [max(0.0, min(i + 1, len(values) - cut) - max(i, cut)) for i in range(len(values))]
    return math.fsum(part * value for part, value in zip(parts, ordered, strict=True)) / math.fsum(parts)


def _improvement(better: Rows, worse: Rows, metric: str) -> tuple[float | None, list[float] | None]:
    """By how much ``better`` is better, and the interval; positive whichever way the metric runs."""
    found = paired(better, worse, metric) if metric.endswith("accuracy") else paired(worse, better, metric)
    return found["difference"], found["interval95"]


def _by_seed(rows: Rows, metric: str) -> dict[int, float]:
    return {row["seed"]: row[metric] for row in rows if row["status"] == "ok"}


def _ratio(triples: Sequence[tuple[float, ...]]) -> float:
    arm, start, tuned = (math.fsum(column) for column in zip(*triples, strict=True))
    return (arm - start) / (tuned - start) if tuned != start else math.nan


def _interval(triples: Sequence[tuple[float, ...]]) -> list[float] | None:
    if len(triples) < 2:
        return None
    dice = random.Random(0)
    drawn = (_ratio(dice.choices(triples, k=len(triples))) for _ in range(_RESAMPLES))
    ratios = sorted(ratio for ratio in drawn if math.isfinite(ratio))
    return [ratios[int(q * (len(ratios) - 1))] for q in (0.025, 0.975)] if ratios else None
