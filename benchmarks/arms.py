"""What the benchmarks share that train arms × seeds: flags, runs, tables, each arm against the best fixed one."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adaptive_loss.records import csv_line, json_dump, provenance, write_atomic
from adaptive_loss.trainer.progress import Progress
from adaptive_loss.trainer.simple_ablation_analysis import paired
from adaptive_loss.trainer.studies import Result, Spec, run_all
from adaptive_loss.utils.commands import command_line
from adaptive_loss.utils.config import RunConfig

Columns = Mapping[str, Callable[[Result], float]]
"""What is shown of a finished run, by name."""


@dataclass(frozen=True, kw_only=True)
class Flags:
    """The flags of such a benchmark."""

    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    """Seeds; every arm runs each of them, paired."""
    data_dir: Path = Path("data")
    """Where the data are, or are downloaded to."""
    output_dir: Path = Path("results")
    """Where the runs, table.csv and table.json go."""
    jobs: int = 1
    """Runs at a time; 0 is one a core."""


def column(name: str) -> Callable[[Result], float]:
    """A test metric of a run."""
    return lambda row: row[f"test_{name}"]


def specs(flags: Flags, arms: Mapping[str, RunConfig]) -> list[Spec]:
    """Every run, a whole seed after the other."""
    return [
        Spec(name, replace(config, seed=seed), flags.output_dir / name.replace(" ", "_") / f"seed_{seed}")
        for seed in flags.seeds
        for name, config in arms.items()
    ]


def conduct(
    prog: str,
    argv: Sequence[str] | None,
    flags: Flags,
    arms: Mapping[str, RunConfig],
    shown: Columns,
    rivals: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """Do what is left of the runs, write and print the tables; their rows. Without ``rivals``, arms of ``baseline``."""
    todo = specs(flags, arms)
    with Progress(len(todo)) as progress:
        done = run_all(todo, flags.jobs, quiet=True, on_row=progress.done)
    rows = [cells(row, shown) for row in done]
    if rivals is None:
        rivals = [name for name, config in arms.items() if config.mode == "baseline"]
    compared = against_best(rows, list(shown), rivals)
    document = {"rows": rows, "against_best": compared, "provenance": provenance(command_line(prog, argv))}
    write_atomic(flags.output_dir / "table.json", json_dump(document))
    write_atomic(flags.output_dir / "table.csv", "".join(csv_line(line) for line in (rows[0], *map(dict.values, rows))))
    print(table(rows, list(shown)), *map(described, compared), sep="\n")
    if len(flags.seeds) < 5:
        print("Warning: fewer than five seeds prove nothing")
    return rows


def exit_code(rows: Sequence[Mapping[str, Any]]) -> int:
    """0 where every run finished."""
    return 0 if all(row["status"] == "ok" for row in rows) else 1


def cells(row: Result, shown: Columns) -> dict[str, Any]:
    """One run in the columns of the table, empty where it failed."""
    ok = row["status"] == "ok"
    return {
        "arm": row["mode"],
        "seed": row["seed"],
        "status": row["status"],
        **{name: read(row) if ok else None for name, read in shown.items()},
    }


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """A line an arm: how many runs finished and failed, and the mean of each column over those that finished."""
    lines = [f"{'arm':<28}{'n':>3}{'failed':>8}" + "".join(f"{name:>18}" for name in columns)]
    for arm in dict.fromkeys(row["arm"] for row in rows):
        own = [row for row in rows if row["arm"] == arm]
        done = [row for row in own if row["status"] == "ok"]
        means = [statistics.fmean(row[name] for row in done) if done else float("nan") for name in columns]
        counts = f"{len(done):>3}{len(own) - len(done):>8}"
        lines.append(f"{arm:<28}{counts}" + "".join(f"{mean:>18.4g}" for mean in means))
    return "\n".join(lines)


def against_best(
    rows: Sequence[Mapping[str, Any]], columns: Sequence[str], rivals: Sequence[str]
) -> list[dict[str, Any]]:
    """Every other arm over the rival whose mean is least, column by column: a ratio of means, 1 + difference/best.

    The rival is chosen by the very runs that it is compared on, which favours the rivals. The interval is that of the
    difference, paired by seed, over the rival's mean.
    """
    found = []
    for name in columns:
        by_arm = {arm: [row for row in rows if row["arm"] == arm] for arm in dict.fromkeys(row["arm"] for row in rows)}
        means = {
            arm: statistics.fmean(row[name] for row in own)
            for arm, own in by_arm.items()
            if arm in rivals and all(row["status"] == "ok" for row in own)
        }
        if not means:
            continue
        best = min(means, key=lambda arm: means[arm])
        for arm in [arm for arm in by_arm if arm not in rivals]:
            gap = paired(by_arm[arm], by_arm[best], name)
            ratio, ends = (None if x is None else _over(x, means[best]) for x in (gap["difference"], gap["interval95"]))
            found.append({"arm": arm, "column": name, "best": best, "ratio": ratio, "interval95": ends})
    return found


def _over(difference: float | Sequence[float], best: float) -> Any:
    return 1 + difference / best if isinstance(difference, float) else [1 + end / best for end in difference]


def described(item: Mapping[str, Any]) -> str:
    """One entry of :func:`against_best` as a line of text."""
    ends, ratio = item["interval95"], item["ratio"]
    between = f" [{ends[0]:.3f}, {ends[1]:.3f}]" if ends else ""
    shown = "-" if ratio is None else f"{ratio:.3f}"
    return f"{item['column']}: {item['arm']} is {shown}{between} times the best, {item['best']}"
