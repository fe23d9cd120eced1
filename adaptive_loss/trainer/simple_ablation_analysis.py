"""What an ablation showed: accuracy by mode, and what each component adds, paired by seed.

One self-contained file: it needs Python 3.10 and nothing else, installed or beside it. It is also the single
home of the statistics that the rest of the package uses.

    python adaptive_loss/trainer/simple_ablation_analysis.py OUTPUT_DIR [--json]

Exit status: 0 complete, 1 partial results or an unreadable file, 2 a mistake in the command line.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import os
import random
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

FILE_NAME = "ablation_results.csv"
COLUMNS = (
    *("mode", "seed", "status", "epochs", "steps", "test_accuracy", "test_loss", "select_accuracy"),
    *("skipped_steps", "interventions", "train_seconds"),
)
MODES = ("baseline", "monitor_only", "controller_only", "full")
CONTROLS = ("base_only", "base_only_all", "tuned", "random_monitor", "lookahead_only")
ALIASES = {"full_adaptive": "full"}
SINGLES = ("monitor_only", "controller_only")
PAIRS = (
    *((mode, "baseline") for mode in (*SINGLES, "full")),
    *(("full", mode) for mode in (*SINGLES, "base_only", "tuned", "lookahead_only", "random_monitor")),
)
_INTEGERS = {"seed", "epochs", "steps", "skipped_steps", "interventions"}
_OPTIONAL = {"select_accuracy", "test_accuracy"}  # no select split is held out, or the task is none of classes


class ResultsError(ValueError):
    """A results file that is missing, empty or damaged; the message is one line naming the file and the fix."""


# Statistics ---------------------------------------------------------------------------------------------------


def t_quantile(df: int, level: float = 0.95) -> float:
    """The t with P(|T| <= t) = ``level`` under Student's law of integer ``df`` >= 1 degrees of freedom.

    For integer df the probability is a finite sum (Abramowitz & Stegun 26.7.3 and 26.7.4); it grows with t,
    so bisection to the last bit inverts it.

    Example:
        >>> round(t_quantile(4), 6)
        2.776445
    """
    low, high = 0.0, 1.0
    while _t_within(high, df) < level:
        high *= 2.0
    while low < (middle := (low + high) / 2.0) < high:
        low, high = (middle, high) if _t_within(middle, df) < level else (low, middle)
    return (low + high) / 2.0


def _t_within(t: float, df: int) -> float:
    """P(|T| <= t) for integer df, with theta = atan(t / sqrt(df))."""
    theta = math.atan(t / math.sqrt(df))
    sine, cosine = math.sin(theta), math.cos(theta)
    odd = df % 2
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for k in range(1 + odd, df, 2):
        total += term
        term *= cosine * cosine * k / (k + 1)
    return 2.0 / math.pi * (theta + sine * total) if odd else sine * total


def mean_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95% t interval of the mean, mean ± t(n - 1) · s / √n; ``None`` for fewer than two values.

    Example:
        >>> tuple(round(end, 4) for end in mean_interval([0.70, 0.71, 0.72]))
        (0.6852, 0.7348)
    """
    n = len(values)
    if n < 2:
        return None
    mean, half = math.fsum(values) / n, t_quantile(n - 1) * statistics.stdev(values) / math.sqrt(n)
    return mean - half, mean + half


def bca_interval(
    differences: Sequence[float], seed: int = 0, resamples: int = 10_000, level: float = 0.95
) -> tuple[float, float] | None:
    """The bias-corrected and accelerated bootstrap interval of the mean (Efron 1987).

    Ends are the bootstrap quantiles at Φ(z₀ + (z₀ + z) / (1 − a(z₀ + z))), where z = Φ⁻¹((1 ∓ level) / 2), z₀ is
    Φ⁻¹ of the share of resampled means below the mean (ties count half) and a is the jackknife's acceleration,
    which for a mean is Σ(d − d̄)³ / (6 (Σ(d − d̄)²)^1.5).

    Returns ``None`` for fewer than two differences, and where all are alike: there is nothing to resample.

    Example:
        >>> low, high = bca_interval([0.1, 0.5, 0.3, 0.9])
        >>> low < 0.45 < high
        True
    """
    n = len(differences)
    if n < 2 or _alike(differences):
        return None
    mean = math.fsum(differences) / n
    draw = random.Random(seed)
    # fsum does not depend on the order of its terms, so that equal resamples are exact ties
    means = sorted(math.fsum(draw.choices(differences, k=n)) / n for _ in range(resamples))
    below = (sum(m < mean for m in means) + sum(m <= mean for m in means)) / 2.0
    normal = statistics.NormalDist()
    z0 = normal.inv_cdf(min(max(below, 0.5), resamples - 0.5) / resamples)
    squares = math.fsum((d - mean) ** 2 for d in differences)
    a = math.fsum((d - mean) ** 3 for d in differences) / (6.0 * squares**1.5)
    shifted = [z0 + normal.inv_cdf(tail) for tail in ((1 - level) / 2, (1 + level) / 2)]
    low, high = (_quantile(means, normal.cdf(z0 + z / (1.0 - a * z))) for z in shifted)
    return low, high


def sign_flip_p(differences: Sequence[float], seed: int = 0, resamples: int = 20_000) -> float | None:
    """Two-sided p of the sign-flip permutation test that paired differences are symmetric about 0.

    p = share of the 2ⁿ sign patterns s with |Σ sᵢdᵢ| >= |Σ dᵢ|: all of them up to n = 16, beyond that
    ``resamples`` random ones, and then (1 + hits) / (1 + resamples).

    Returns ``None`` where no test exists: fewer than two pairs, or all differences 0.

    Example:
        >>> sign_flip_p([0.4, 0.2, 0.9])
        0.25
    """
    n = len(differences)
    if n < 2 or not any(differences):
        return None
    tolerance = 1e-12 * math.fsum(abs(d) for d in differences)
    bar = abs(math.fsum(differences)) - tolerance
    if n <= 16:
        sums = [differences[0]]  # a pattern and its mirror image tie: the first sign may stay
        for d in differences[1:]:
            sums = [s + d for s in sums] + [s - d for s in sums]
        return sum(abs(s) >= bar for s in sums) / len(sums)
    draw = random.Random(seed)
    flips = (sum(d if draw.random() < 0.5 else -d for d in differences) for _ in range(resamples))
    return (1 + sum(abs(s) >= bar for s in flips)) / (1 + resamples)


def _alike(values: Sequence[float]) -> bool:
    return max(values) - min(values) <= 1e-12 * max(1.0, abs(max(values)), abs(min(values)))


def _quantile(ordered: Sequence[float], q: float) -> float:
    """Linear interpolation between order statistics."""
    place = q * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


# Rows ---------------------------------------------------------------------------------------------------------


def modes_of(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """The modes in the rows: the four first, then the controls, then any other in order of appearance."""
    present = dict.fromkeys(row["mode"] for row in rows)
    known = [mode for mode in (*MODES, *CONTROLS) if mode in present]
    return known + [mode for mode in present if mode not in known]


def _by_seed(rows: Iterable[Mapping[str, Any]], metric: str) -> dict[int, float]:
    return {r["seed"]: r[metric] for r in rows if r["status"] == "ok" and r[metric] is not None}


def metric_of(rows: Iterable[Mapping[str, Any]]) -> str:
    """What runs are judged by: ``test_accuracy``, or ``test_loss`` where the task has no accuracy."""
    finished = [row for row in rows if row["status"] == "ok"]
    return "test_loss" if finished and all(row.get("test_accuracy") is None for row in finished) else "test_accuracy"


def paired(
    rows_a: Iterable[Mapping[str, Any]], rows_b: Iterable[Mapping[str, Any]], metric: str = "test_accuracy"
) -> dict[str, Any]:
    """Mean of a − b over the seeds that finished in both arms, with BCa interval and sign-flip p.

    Accuracies are compared in percentage points, any other metric in its own unit.

    Returns:
        ``n_pairs``, ``difference``, ``interval95`` as [low, high], ``p``; ``None`` for what does not exist.

    Example:
        >>> row = lambda seed, accuracy: {"seed": seed, "status": "ok", "test_accuracy": accuracy}
        >>> result = paired([row(1, 0.75), row(2, 0.5)], [row(1, 0.5), row(2, 0.5)])
        >>> result["n_pairs"], result["difference"], result["p"]
        (2, 12.5, 1.0)
    """
    a, b = _by_seed(rows_a, metric), _by_seed(rows_b, metric)
    unit = 100.0 if metric.endswith("accuracy") else 1.0
    differences = [unit * (a[seed] - b[seed]) for seed in sorted(a.keys() & b.keys())]
    interval = bca_interval(differences)
    return {
        "n_pairs": len(differences),
        "difference": math.fsum(differences) / len(differences) if differences else None,
        "interval95": list(interval) if interval else None,
        "p": sign_flip_p(differences),
    }


def summarise(rows: Iterable[Mapping[str, Any]], metric: str = "test_accuracy") -> dict[str, dict[str, Any]]:
    """By mode: ``n`` finished runs, ``failed`` runs, ``mean``, ``std`` (n − 1) and ``interval95`` of the metric.

    Example:
        >>> rows = [{"mode": "full", "seed": 1, "status": "ok", "test_accuracy": 0.75}]
        >>> summarise(rows)["full"]["mean"], summarise(rows)["full"]["std"]
        (0.75, None)
    """
    rows = list(rows)
    summary: dict[str, dict[str, Any]] = {}
    for mode in modes_of(rows):
        own = [row for row in rows if row["mode"] == mode]
        values = list(_by_seed(own, metric).values())
        interval = mean_interval(values)
        summary[mode] = {
            "n": len(values),
            "failed": sum(row["status"] != "ok" for row in own),
            "mean": math.fsum(values) / len(values) if values else None,
            "std": statistics.stdev(values) if len(values) > 1 else None,
            "interval95": list(interval) if interval else None,
        }
    return summary


def compare(
    rows: Iterable[Mapping[str, Any]], pairs: Iterable[tuple[str, str]] = PAIRS, metric: str = "test_accuracy"
) -> list[dict[str, Any]]:
    """:func:`paired` for each (a, b) of ``pairs`` whose two modes are in the rows, with ``a`` and ``b``.

    Any metric but the accuracy, which is what a comparison means by itself, is named in ``metric``.
    """
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["mode"], []).append(row)
    known = [(a, b) for a, b in pairs if a in groups and b in groups]
    named = {} if metric == "test_accuracy" else {"metric": metric}
    return [{"a": a, "b": b, **named, **paired(groups[a], groups[b], metric)} for a, b in known]


# Reading ------------------------------------------------------------------------------------------------------


def printable(text: object) -> str:
    """``text`` in one line, control and invisible characters escaped: safe to send to a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in str(text))


def find_results(path: Path) -> Path:
    """The results file at ``path``: a csv file, or ``ablation_results.csv`` in a folder."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise ResultsError(f"{path}: no such folder or file; pass the study's output folder")
    if (path / FILE_NAME).is_file():
        return path / FILE_NAME
    others = sorted(file.name for file in path.glob("*_results.csv") if file.is_file())
    hint = f"; to read {others[0]} pass that file" if others else "; run the ablation study into it first"
    raise ResultsError(f"{path}: no {FILE_NAME} in this folder{hint}")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a results csv, cells as numbers and empty cells as ``None``.

    Raises:
        ResultsError: unreadable, wrong header, torn or ill-typed line, the same mode and seed twice.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
        lines = list(csv.reader(io.StringIO(text, newline=""), strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ResultsError(f"{path}: cannot be read as csv ({error}); write it again with the study") from error
    if not lines or tuple(lines[0]) != COLUMNS:
        raise ResultsError(f"{path}: line 1 is not the header {','.join(COLUMNS)}; write it again with the study")
    try:
        rows = [parse_row(cells, f"{path}: row {number}") for number, cells in enumerate(lines[1:], 1) if cells]
    except ResultsError as error:
        raise ResultsError(f"{error}; the study writes the file again from its runs") from None
    _check_keys(rows, path)
    return rows


def _check_keys(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Every mode has a seed once, there is a run at all, and all that finished have an accuracy, or none has."""
    if not rows:
        raise ResultsError(f"{path}: holds no run; run the study to its end")
    metric, seen = metric_of(rows), set()
    for row in rows:
        key = row["mode"], row["seed"]
        if key in seen:
            raise ResultsError(f"{path}: mode {key[0]} seed {key[1]} stands there twice; keep one row")
        if row["status"] == "ok" and row[metric] is None:
            raise ResultsError(f"{path}: mode {key[0]} seed {key[1]} has no {metric}; write it again with the study")
        seen.add(key)


def parse_row(cells: Sequence[str], where: str = "row") -> dict[str, Any]:
    """The cells of one csv line as typed values by column; :class:`ResultsError` names the cell at fault."""
    if len(cells) != len(COLUMNS):
        raise ResultsError(f"{where}: {len(cells)} of {len(COLUMNS)} cells, torn or damaged; rerun that run")
    raw = dict(zip(COLUMNS, cells, strict=True))
    status = raw["status"]
    if not raw["mode"] or not (status == "ok" or status.startswith("failed")):
        raise ResultsError(f"{where}: mode {raw['mode']!r}, status {status!r} is neither 'ok' nor 'failed: reason'")
    row: dict[str, Any] = {"mode": ALIASES.get(raw["mode"], raw["mode"]), "seed": None, "status": status}
    for name in COLUMNS:
        if name not in ("mode", "status"):
            row[name] = _number(name, raw[name], where, name == "seed" or (status == "ok" and name not in _OPTIONAL))
    return row


def _number(name: str, text: str, where: str, required: bool) -> float | int | None:
    if not text and not required:
        return None
    try:
        value = int(text) if name in _INTEGERS else float(text)
    except ValueError:
        raise ResultsError(f"{where}: {name} is {text[:40]!r}, not a number") from None
    if isinstance(value, float) and not math.isfinite(value):
        raise ResultsError(f"{where}: {name} is {text[:40]!r}; a run that ended there counts as failed")
    if name.endswith("accuracy") and not 0.0 <= value <= 1.0:
        raise ResultsError(f"{where}: {name} is {text[:40]}, not a fraction from 0 to 1")
    return value


# Telling ------------------------------------------------------------------------------------------------------


def read_asked(file: Path) -> tuple[list[str], list[int]]:
    """Modes and seeds that the study was asked for, from the JSON beside its csv; none where that cannot be read."""
    try:
        config = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))["config"]
        return [ALIASES.get(mode, mode) for mode in map(str, config["modes"])], [int(seed) for seed in config["seeds"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return [], []


def missing(
    rows: Sequence[Mapping[str, Any]], asked_modes: Sequence[str] = (), asked_seeds: Sequence[int] = ()
) -> list[str]:
    """What a complete study has, or was asked for, and these rows lack: modes, seeds in a mode, runs that failed."""
    modes = modes_of(rows)
    gaps = [f"mode {mode} is missing" for mode in dict.fromkeys((*MODES, *asked_modes)) if mode not in modes]
    seeds = {row["seed"] for row in rows}.union(asked_seeds)
    for mode in modes:
        absent = sorted(seeds - {row["seed"] for row in rows if row["mode"] == mode})
        if absent:
            gaps.append(f"mode {mode} lacks seed{'s' * (len(absent) > 1)} {', '.join(map(str, absent))}")
    failed = [row for row in rows if row["status"] != "ok"]
    return gaps + [f"mode {row['mode']} seed {row['seed']} {row['status']}" for row in failed]


def analyse(
    rows: Sequence[Mapping[str, Any]], asked_modes: Sequence[str] = (), asked_seeds: Sequence[int] = ()
) -> dict[str, Any]:
    """Everything the command prints, as one JSON-ready dictionary."""
    metric = metric_of(rows)
    summary = summarise(rows, metric)
    best = max if metric == "test_accuracy" else min
    finished = [m for m in SINGLES if m in summary and summary[m]["n"]]
    fewest = min((entry["n"] for mode, entry in summary.items() if mode in MODES), default=0)
    return {
        "metric": metric,
        "pairing": "paired by seed",
        "seeds": sorted({row["seed"] for row in rows}),
        "summary": summary,
        "comparisons": compare(rows, metric=metric),
        "best_single": best(finished, key=lambda m: summary[m]["mean"], default=None),
        "missing": missing(rows, asked_modes, asked_seeds),
        "warnings": ["fewer than five seeds prove nothing"] if fewest < 5 else [],
    }


def _mean_line(mode: str, entry: Mapping[str, Any], scale: float) -> str:
    mean = "none finished" if entry["mean"] is None else f"{scale * entry['mean']:.2f}"
    std = "" if entry["std"] is None else f" ± {scale * entry['std']:.2f}"
    ends = entry["interval95"]
    interval = f"[{scale * ends[0]:.2f}, {scale * ends[1]:.2f}]" if ends else "-"
    return f"  {printable(mode):<18}{entry['n']:>3}{entry['failed']:>8}  {mean + std:<16}{interval}"


def _difference_line(item: Mapping[str, Any], note: str = "") -> str:
    label = f"{item['a']} - {item['b']}"
    if item["difference"] is None:
        return f"  {label:<34}no seed finished in both"
    ends = item["interval95"]
    interval = f"[{ends[0]:+.2f}, {ends[1]:+.2f}]" if ends else "no interval"
    count = item["n_pairs"]
    p = "no p" if item["p"] is None else f"p {item['p']:.3g}"
    return f"  {label:<34}{item['difference']:+7.2f}  {interval:<17} {p:<9} {count} pair{'s' * (count != 1)}{note}"


def _section(title: str, lines: Sequence[str]) -> list[str]:
    return ["", title, *lines] if lines else []


def describe(result: Mapping[str, Any]) -> str:
    """The dictionary of :func:`analyse` as plain text."""
    pairs = {(item["a"], item["b"]): item for item in result["comparisons"]}
    best = result["best_single"]
    over = [_difference_line(pairs[m, "baseline"]) for m in SINGLES if (m, "baseline") in pairs]
    both = [
        _difference_line(pairs["full", m], "  (best single component)" * (m == best))
        for m in SINGLES
        if ("full", m) in pairs
    ]
    controls = [_difference_line(item) for (a, b), item in pairs.items() if a == "full" and b in CONTROLS]
    whole = [_difference_line(pairs["full", "baseline"])] if ("full", "baseline") in pairs else []
    accuracy = result["metric"] == "test_accuracy"
    title, unit, scale = ("Test accuracy (%)", "percentage points", 100.0) if accuracy else ("Test loss", "nats", 1.0)
    table = [_mean_line(mode, entry, scale) for mode, entry in result["summary"].items()]
    lines = [f"Ablation, {result['pairing']}: {', '.join(map(str, result['seeds']))}"]
    lines += _section(f"{title:<22}n  failed  mean ± std      95% interval", table)
    lines += _section(f"Contribution over baseline ({unit}, 95% interval)", over)
    lines += _section("Full: recovery from untuned weights", whole)
    lines += _section("Full against each component alone", both)
    lines += _section("Full against the controls", controls)
    lines += _section("Missing", [f"  {printable(gap)}" for gap in result["missing"]])
    lines += [f"\nWarning: {warning}" for warning in result["warnings"]]
    return "\n".join(lines)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and how it is called."""

    def error(self, message: str) -> NoReturn:
        usage = " ".join(self.format_usage().split())
        print(f"error: {printable(message)} ({usage})", file=sys.stderr)
        raise SystemExit(2)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = _Parser(prog="simple_ablation_analysis", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("results", metavar="DIR", type=Path, help=f"the folder with {FILE_NAME}, or the csv itself")
    parser.add_argument("--json", action="store_true", help="print the same as JSON")
    options = parser.parse_args(argv)
    try:
        file = find_results(options.results)
        result = {"file": str(file), **analyse(read_rows(file), *read_asked(file))}
    except (ResultsError, OSError, ValueError) as error:
        print(f"error: {printable(error)}", file=sys.stderr)
        return 1
    text = json.dumps(result, indent=2, allow_nan=False) if options.json else describe(result)
    encoding = sys.stdout.encoding or "utf-8"
    try:  # a terminal that cannot show a character gets its escape, a reader that left early gets silence
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1 if result["missing"] else 0


if __name__ == "__main__":
    sys.exit(main())
