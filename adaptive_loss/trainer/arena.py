"""Task families × rules × starts in one table: ``adaptive-loss arena --tasks vae pinn --weightings adaptive dwa``."""

from __future__ import annotations

import json
import random
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from adaptive_loss import records
from adaptive_loss.errors import UsageError
from adaptive_loss.trainer import compare, plan
from adaptive_loss.trainer.arms import OWN_START, rule_arm, sourced, started
from adaptive_loss.trainer.recovery import interquartile_mean, recovery
from adaptive_loss.trainer.studies import Result, Spec, finished, worker_count
from adaptive_loss.trainer.study import Study, StudyFlags, check, check_list, complete, prepare, report_failures
from adaptive_loss.trainer.task_flags import completed
from adaptive_loss.utils.commands import command, command_line, parse
from adaptive_loss.utils.config import check_policy

PROG = "adaptive-loss arena"
RIVALS = ("fixed", "tuned")
"""What every arm is measured against: its start weights held, and those of the search."""
CELLS = ("task", "weighting", "start", "n", "failed", "metric", "mean", "gain", "gap", "recovered", "cost")
ANY = "random"
"""In a start, in place of a term: one drawn by the task's name, so that it is the same for every rule."""


@dataclass(frozen=True, kw_only=True)
class Flags(StudyFlags):
    """The flags of the arena."""

    tasks: tuple[str, ...] = ()
    """The families, file names in adaptive_loss/tasks; all of them where none is named."""
    weightings: tuple[str, ...] = ("lookahead_only", "adaptive", "uncertainty", "dwa", "gradnorm", "inverse_ema")
    """The rules and modes; fixed and tuned are always there."""
    starts: tuple[str, ...] = ("customary", "random*10", "random/10")
    """Where they start: given or customary weights, or one term's too high or low; random is a term, drawn."""
    seeds: tuple[int, ...] = (1, 42, 123, 456, 789)
    """Seeds; every arm runs each of them, paired."""
    dataset: str = ""
    """What all learn on; each task's own first where none is given."""
    trials: int = 24
    """Runs of each family's weight search."""
    output_dir: Path = Path("results/arena")
    """Where everything goes, a folder a family and in it one a rule."""
    quick: bool = False
    """The tasks' short forms, a minute a run at most."""
    smoke: bool = False
    """The tasks' shortest forms, to see that it runs."""


@dataclass(frozen=True)
class Entry:
    """One family under one rule: a study of its own, so that another rule or family leaves it as it is.

    A replay is in the study of what it replays.
    """

    task: str
    weighting: str
    study: Study


@command
def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    flags = parse(Flags, argv, PROG, "Run families, rules and starts against tuned weights; one table of recovery.")
    begun, typed = time.time(), command_line(PROG, argv)
    entries = entries_of(flags, typed)
    for entry in entries:
        if entry.weighting == "fixed":  # a rule that a task cannot serve is left out, not refused
            check(entry.study)
    check_policy(flags.policy, [arm.mode for entry in entries for arm in entry.study.arms])
    worker_count(flags.jobs)
    check_kept(flags, entries)
    if flags.dry_run:
        studies = {entry.study.folder: entry.study for entry in entries}.values()
        return plan.show([spec for study in studies for spec in _specs(study)], flags.jobs, flags.json)
    rows, left_out = run_entries(entries, flags.jobs)
    document = {
        "config": _asked(flags, entries),
        "cells": [cell for entry in entries if _key(entry) in rows for cell in cells_of(entry, rows, flags.starts)],
        "left_out": {f"{task}: {weighting}": reason for (task, weighting), reason in left_out.items()},
        "provenance": records.provenance(typed, begun),
    }
    document["summary"] = summary(document["cells"])
    _write(document, flags.output_dir)
    print(records.json_dump(document) if flags.json else table(document))
    if not flags.json:
        print(f"\nwritten: {flags.output_dir / 'arena.csv'}, arena.json")
    report_failures([row for of_entry in rows.values() for row in of_entry])
    return 0


def entries_of(flags: Flags, argv: Sequence[str]) -> list[Entry]:
    """Every family's rivals, then every rule in it, as studies."""
    from adaptive_loss.tasks import tasks

    check_list("weightings", flags.weightings)
    names = flags.tasks or tuple(tasks.names())
    check_list("tasks", names)
    together: dict[str, list[str]] = {}
    arms = sourced([rule_arm(name, "--weightings") for name in flags.weightings], "--weightings")
    for name, arm in zip(flags.weightings, arms, strict=True):
        if arm.name not in RIVALS:
            together.setdefault(arm.source or arm.name, []).append(name)
    entries = []
    for task in names:
        for rules in (RIVALS, *together.values()):
            study = compare.study_of(_for_task(flags, task, tuple(rules)), argv)
            entries += [Entry(task, rule, study) for rule in rules if rule != "tuned"]
    return entries


def _for_task(flags: Flags, task: str, rules: tuple[str, ...]) -> compare.Flags:
    """The comparison of ``rules``: what was given holds for every task, the rest is the task's own."""
    shared = {field.name for field in fields(compare.Flags)} & {field.name for field in fields(flags)}
    given = {name: getattr(flags, name) for name in shared if getattr(flags, name) != getattr(Flags(), name)}
    place = {
        "task": task,
        "seeds": flags.seeds,
        "weightings": rules,
        "starts": starts_of(task, flags.starts),
        "output_dir": flags.output_dir / task / rules[0].replace(":", "_"),
    }
    return completed(compare.Flags(**{**given, **place}), "arena")


def starts_of(task: str, starts: Sequence[str]) -> tuple[str, ...]:
    """``starts`` with a term in place of ``random``.

    Example:
        >>> starts_of("vae", ["customary", "random*10"])
        ('customary', 'kl*10')
    """
    from adaptive_loss.tasks import tasks

    kind = tasks.get(task)
    stays = {*kind.bases(), *kind.pinned}
    free = [term for term in kind.all_terms() if term not in stays and kind.customary.get(term, 1.0) > 0]
    # An opponent's weights are held under every rule, so they are wrong only where the task has no others.
    drawn = random.Random(task).choice([t for t in free if t in kind.terms] or free or kind.terms)
    return tuple(drawn + start.removeprefix(ANY) if start.startswith(ANY) else start for start in starts)


def _specs(study: Study) -> list[Spec]:
    search = study.search()
    return [*(search.specs() if search else ()), *study.specs()]


def _key(entry: Entry) -> tuple[str, str]:
    return entry.task, entry.weighting


def run_entries(
    entries: Sequence[Entry], jobs: int
) -> tuple[dict[tuple[str, str], list[Result]], dict[tuple[str, str], str]]:
    """Do what is left of every entry: rows by task and rule, and why a rule is left out of a task.

    A rule that needs what a task cannot give it is left out; what is wrong with a family's rivals stops the arena.
    """
    rows: dict[tuple[str, str], list[Result]] = {}
    left_out: dict[tuple[str, str], str] = {}
    for entry in entries:
        try:
            check(entry.study)  # before anything of it is on disk
            if any(finished(spec) is None for spec in entry.study.specs()):
                prepare(entry.study.settings)
            rows[_key(entry)] = [row for row in complete(entry.study, jobs) if _is_of(entry, row)]
        except UsageError as error:
            if entry.weighting == "fixed":
                raise
            left_out[_key(entry)] = str(error)
    return rows, left_out


def _is_of(entry: Entry, row: Result) -> bool:
    """Whether a row is of the entry's rule; those of tuned weights count to ``fixed``."""
    name = row["mode"].partition("/")[0]
    return name in RIVALS if entry.weighting == "fixed" else name == rule_arm(entry.weighting, "--weightings").name


def cells_of(
    entry: Entry, rows: Mapping[tuple[str, str], Sequence[Result]], starts: Sequence[str]
) -> list[dict[str, Any]]:
    """One cell a start: the arm's rows beside those of the same start held, and of tuned weights."""
    rivals, metric = rows[entry.task, "fixed"], entry.study.metric
    assert metric is not None
    tuned = [row for row in rivals if row["mode"] == "tuned"]
    arm, cells = rule_arm(entry.weighting, "--weightings"), []
    for start, named in zip(starts, starts_of(entry.task, starts), strict=True):
        name, held = (started(rule_arm(rule, "--weightings"), named).name for rule in (entry.weighting, "fixed"))
        mine = [row for row in rows[_key(entry)] if row["mode"] == name]
        fixed = [row for row in rivals if row["mode"] == held]
        done = [row[metric] for row in mine if row["status"] == "ok"]
        cells.append(
            {
                "task": entry.task,
                "weighting": arm.name,
                "start": named if start == named or arm.start in OWN_START else f"{start} ({named})",
                "n": len(done),
                "failed": len(mine) - len(done),
                "metric": metric,
                "mean": statistics.fmean(done) if done else None,
                **recovery(mine, fixed, tuned, metric),
                "cost": _cost(mine, fixed),
            }
        )
    return cells


def _cost(mine: Sequence[Result], fixed: Sequence[Result]) -> float | None:
    """Median over seeds of the seconds that the arm trained, as a multiple of its start weights held."""
    took = {row["seed"]: row["train_seconds"] for row in fixed if row["status"] == "ok"}
    ratios = [row["train_seconds"] / took[row["seed"]] for row in mine if row["status"] == "ok" and row["seed"] in took]
    return statistics.median(ratios) if ratios else None


def summary(cells: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """By rule: the interquartile mean and the least of what it recovered, its failure rate and its median cost."""
    found = {}
    for rule in dict.fromkeys(cell["weighting"] for cell in cells):
        own = [cell for cell in cells if cell["weighting"] == rule]
        recovered = [cell["recovered"] for cell in own if cell["recovered"] is not None]
        runs, costs = sum(cell["n"] + cell["failed"] for cell in own), [cell["cost"] for cell in own if cell["cost"]]
        found[rule] = {
            "cells": len(own),
            "with_gap": len(recovered),
            "recovered": interquartile_mean(recovered),
            "least": min(recovered, default=None),
            "harmed": sum(cell["gain95"] is not None and cell["gain95"][1] < 0 for cell in own),
            "failure_rate": sum(cell["failed"] for cell in own) / runs if runs else None,
            "cost": statistics.median(costs) if costs else None,
        }
    return found


def table(document: Mapping[str, Any]) -> str:
    """The summary by rule, then every cell, as plain text."""
    lines = [f"{'rule':<24}{'gaps':>6}{'recovered':>11}{'least':>8}{'harmed':>8}{'failed':>8}{'cost':>7}"]
    for rule, entry in document["summary"].items():
        shown = [_number(entry[name], ".2f") for name in ("recovered", "least")]
        failed = _number(entry["failure_rate"], ".1%")
        gaps = f"{entry['with_gap']}/{entry['cells']}"
        cost = _number(entry["cost"], ".2f")
        lines.append(f"{rule:<24}{gaps:>6}{shown[0]:>11}{shown[1]:>8}{entry['harmed']:>8}{failed:>8}{cost:>7}")
    lines += ["", "by task and start; gain is over the start weights held, recovered a part of what tuning gains"]
    for cell in document["cells"]:
        place = f"{cell['task']}: {cell['weighting']}, {cell['start']}"
        recovered = _with_interval(cell["recovered"], cell["recovered95"], ".2f")
        gain = _with_interval(cell["gain"], cell["gain95"], "+.4g")
        value = _number(cell["mean"], ".4g")
        lines.append(f"{place:<56}{cell['metric'].removeprefix('test_')} {value}  gain {gain}  recovered {recovered}")
    lines += [f"left out, {place}: {reason}" for place, reason in document["left_out"].items()]
    if len(document["config"]["seeds"]) < 5:
        lines.append("\nWarning: fewer than five seeds prove nothing")
    return "\n".join(lines)


def _number(value: float | None, digits: str) -> str:
    return "-" if value is None else f"{value:{digits}}"


def _with_interval(value: float | None, ends: Sequence[float] | None, digits: str) -> str:
    between = "" if value is None or ends is None else f" [{ends[0]:{digits}}, {ends[1]:{digits}}]"
    return _number(value, digits) + between


def _asked(flags: Flags, entries: Sequence[Entry]) -> dict[str, Any]:
    rules = list(dict.fromkeys(entry.weighting for entry in entries))
    names = list(dict.fromkeys(entry.task for entry in entries))
    lists = {"tasks": names, "weightings": rules, "starts": list(flags.starts), "seeds": list(flags.seeds)}
    return {**lists, "trials": flags.trials, "quick": flags.quick, "smoke": flags.smoke}


def check_kept(flags: Flags, entries: Sequence[Entry]) -> None:
    """Raise :class:`UsageError` where the table that is there holds what this one would drop."""
    file = flags.output_dir / "arena.json"
    if not file.exists():
        return
    try:
        there = json.loads(file.read_text(encoding="utf-8"))["config"]
        asked = _asked(flags, entries)
        dropped = [
            str(v) for key in ("tasks", "weightings", "starts", "seeds") for v in there[key] if v not in asked[key]
        ]
    except (OSError, ValueError, KeyError, TypeError):
        raise UsageError(f"{file} is no table of an arena; move it away or choose another --output-dir") from None
    if dropped:
        raise UsageError(f"{file} also holds {', '.join(dropped)}; ask for them too or choose another --output-dir")


def _write(document: Mapping[str, Any], folder: Path) -> None:
    lines = [records.csv_line(CELLS), *(records.csv_line([cell[name] for name in CELLS]) for cell in document["cells"])]
    records.write_atomic(folder / "arena.csv", "".join(lines))
    records.write_atomic(folder / "arena.json", records.json_dump(document))


if __name__ == "__main__":
    sys.exit(main())
