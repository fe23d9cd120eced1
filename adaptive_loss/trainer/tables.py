"""A study's means by arm and paired differences, as plain text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from adaptive_loss.trainer.simple_ablation_analysis import compare, metric_of, printable, summarise
from adaptive_loss.trainer.studies import Result


def tables(rows: Sequence[Result], pairs: Sequence[tuple[str, str]], metric: str | None = None) -> str:
    """The means by arm, and the differences a − b of ``pairs``, with a warning for fewer than five seeds.

    Args:
        rows: of all runs.
        pairs: the comparisons; those whose arms are not in the rows are left out.
        metric: the column that runs are judged by; None is the accuracy, or the loss in nats without one.
    """
    judged = metric or metric_of(rows)
    accuracy = judged.endswith("accuracy")
    name = judged.removeprefix("test_").replace("_", " ")
    unit = "percentage points" if accuracy else "nats" if metric is None else f"{name}, lower is better"
    summary = summarise(rows, judged)
    summary = {arm: summary[arm] for arm in dict.fromkeys(row["mode"] for row in rows)}
    width = max(18, *(len(arm) + 2 for arm in summary))
    lines = [f"{'mode':<{width}}{'n':>3}{'failed':>8}   test {name}{' (%)' * accuracy}, 95% interval"]
    for arm, entry in summary.items():
        lines.append(f"{printable(arm):<{width}}{entry['n']:>3}{entry['failed']:>8}   {_mean(entry, accuracy)}")
    lines += ["", f"difference in {unit}, paired by seed, 95% interval"]
    compared = [(f"{item['a']} - {item['b']}", item) for item in compare(rows, pairs, judged)]
    width = max(36, *(len(label) + 2 for label, _ in compared)) if compared else 0
    lines += [f"{label:<{width}}{_difference(item, accuracy)}" for label, item in compared]
    if len({row["seed"] for row in rows}) < 5:
        lines.append("\nWarning: fewer than five seeds prove nothing")
    return "\n".join(lines)


def _mean(entry: Mapping[str, Any], accuracy: bool) -> str:
    if entry["mean"] is None:
        return "none finished"
    ends = entry["interval95"]
    interval = f"  [{_shown(ends[0], accuracy)}, {_shown(ends[1], accuracy)}]" if ends else ""
    return _shown(entry["mean"], accuracy) + interval


def _difference(item: Mapping[str, Any], accuracy: bool) -> str:
    if item["difference"] is None:
        return "no seed finished in both"
    ends, p = item["interval95"], item["p"]
    digits = "+.2f" if accuracy else "+.4g"
    interval = f"  [{ends[0]:{digits}}, {ends[1]:{digits}}]" if ends else ""
    return f"{item['difference']:{digits}}{interval}" + (f"  p {p:.3g}" if p is not None else "")


def _shown(value: float, accuracy: bool) -> str:
    return f"{100 * value:.2f}" if accuracy else f"{value:.4g}"
