"""A study from its flags to its results: arms × seeds, the search for tuned weights, the results files."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from adaptive_loss import records
from adaptive_loss.errors import RunError, UsageError
from adaptive_loss.ledger import Ledger
from adaptive_loss.modes import modes
from adaptive_loss.trainer import plan
from adaptive_loss.trainer.arms import Arm
from adaptive_loss.trainer.progress import Progress
from adaptive_loss.trainer.simple_ablation_analysis import PAIRS
from adaptive_loss.trainer.studies import Result, Spec, check_folders, failed_row, finished, run_all, worker_count
from adaptive_loss.trainer.tables import tables
from adaptive_loss.trainer.tuning import Search, search_for
from adaptive_loss.utils.config import (
    LARGEST_SEED,
    RunConfig,
    Settings,
    differences,
    from_json,
    held_targets,
    resolve_device,
    run_config,
    start_weights,
    to_json,
    validate,
)


@dataclass(frozen=True, kw_only=True)
class ManyFlags(Settings):
    """What every command that trains many times takes besides the settings of its runs."""

    jobs: int = 0
    """Runs at a time, each in its own process; 0 is one a core."""
    dry_run: bool = False
    """Show what would run, the time and the disk, and start nothing."""
    json: bool = False
    """Print one JSON document instead of tables."""
    config: Path | None = None
    """A JSON file of flags, such as those in experiments/; flags given here override it."""


@dataclass(frozen=True, kw_only=True)
class StudyFlags(ManyFlags):
    """What every study takes besides the settings of its runs."""

    seeds: tuple[int, ...] = (1, 42, 123)
    """Seeds; every arm runs each of them, paired."""


@dataclass(frozen=True)
class Study:
    """Arms × seeds with common settings, written to ``output`` (a .csv) and the .json of the same stem.

    Args:
        settings: what the runs share.
        arms, seeds: what is run.
        output, folder: the results, and where the runs go.
        trials: of the search behind the arms that start from tuned weights.
        argv, start: the command as typed, and when it began.
        tuned: what the search found, where it need not be searched.
        source: where the data come from.
        comparisons: (a, b) for a − b; by default every other arm with ``baseline``, and the full system with controls.
        metric: the column of the test metric that runs are judged by; None is the accuracy, or the loss without one.
    """

    settings: Settings
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    output: Path
    folder: Path
    trials: int = 24
    argv: tuple[str, ...] = ()
    start: float = field(default_factory=time.time)
    tuned: Mapping[str, float] | None = None
    source: Mapping[str, object] | None = None
    comparisons: tuple[tuple[str, str], ...] | None = None
    metric: str | None = None

    @property
    def modes(self) -> list[str]:
        """The arms' names."""
        return [arm.name for arm in self.arms]

    def specs(self) -> list[Spec]:
        """A run for every arm and seed, in the order of the results."""
        return [self._spec(arm, seed) for arm in self.arms for seed in self.seeds]

    def _spec(self, arm: Arm, seed: int) -> Spec:
        own = {"weights": arm.weights(self.settings, self.tuned), "weighting": arm.weighting or self.settings.weighting}
        settled = arm.start != "tuned" or self.tuned is not None
        if arm.source is not None:
            source = next(other for other in self.arms if other.name == arm.source)
            row = finished(self._spec(source, seed))
            settled = row is not None
            own |= arm.replayed(own["weights"], row["weights"]) if row else {}
        config = run_config(self.settings, mode=arm.mode, seed=seed, **own)
        return Spec(arm.name, config, self.folder / arm.name / f"seed_{seed}", settled)

    def search(self) -> Search | None:
        """What has to find weights before the runs; None where no arm waits for it."""
        waits = self.tuned is None and any(arm.start == "tuned" for arm in self.arms)
        return search_for(self.settings, self.folder / "tuned", self.trials) if waits else None

    def pairs(self) -> list[tuple[str, str]]:
        """The comparisons to make."""
        if self.comparisons is not None:
            return list(self.comparisons)
        with_baseline = [(mode, "baseline") for mode in self.modes if mode != "baseline"]
        return with_baseline + [pair for pair in PAIRS if pair[1] != "baseline"]

    def document(self) -> dict[str, Any]:
        """The configuration that the results file records."""
        shared = {name: value for name, value in to_json(self.settings).items() if name in to_json(Settings())}
        judged = {} if self.metric is None else {"metric": self.metric}
        return {**shared, "modes": self.modes, "seeds": list(self.seeds), "trials": self.trials, **judged}


def task_terms(settings: Settings) -> list[str]:
    """The names of the task's terms, the base first."""
    from adaptive_loss.tasks import tasks

    return list(tasks.get(settings.task).all_terms())


def check_settings(settings: Settings) -> None:
    """Raise :class:`UsageError` where the device, the task's dataset, a term or what the rule needs is not there.

    All but the dataset need torch, so a command that asks for none of them, of the first task, is spared its import.
    """
    if settings.device == "cuda":
        resolve_device(settings.device)
    if settings.task != Settings.task:
        from adaptive_loss.tasks import tasks
        from adaptive_loss.tasks.base import check_dataset

        check_dataset(settings.dataset, tasks.get(settings.task).datasets)
    if settings.weighting != Settings.weighting:
        from adaptive_loss.weighting import weightings

        if "targets" in getattr(weightings.get(settings.weighting), "needs", ()) and not settings.targets:
            raise UsageError(f"weighting {settings.weighting!r} needs targets: say what to hold, --targets term=value")
    if settings.weights or settings.targets:
        _check_terms(settings)


def _check_terms(settings: Settings) -> None:
    from adaptive_loss.tasks import tasks

    config, kind = run_config(settings, mode="baseline", seed=0), tasks.get(settings.task)
    weights = start_weights(config, task_terms(settings))
    for base in kind.bases():
        if weights[base] == 0:
            raise UsageError(
                f"--weights {base}=0: the base term needs a weight above 0; set the others' weights against it"
            )
    held_targets(config, {name: weight for name, weight in weights.items() if name in kind.terms}, kind.base)


def check_base(settings: Settings, arms: Sequence[Arm]) -> None:
    """Raise :class:`UsageError` for a mode that trains on the base term alone, where the task has none."""
    from adaptive_loss.tasks import tasks

    alone = [arm.mode for arm in arms if modes.get(arm.mode)().base_only]
    if alone and tasks.get(settings.task).base is None:
        raise UsageError(f"mode {alone[0]}: task {settings.task} has no base term; leave that mode out")


def prepare(settings: Settings) -> Mapping[str, object]:
    """Meet once, before the first run, what would stop every run: absent data, or a batch larger than they are.

    A download happens here, once and with its progress in sight, not in each worker.

    Returns:
        Where the data come from, with their hash.
    """
    import torch

    from adaptive_loss.data import datasets
    from adaptive_loss.data.base import Batches

    size = {} if settings.subset is None else {"subset": settings.subset}
    data = datasets.get(settings.dataset)(settings.data_dir, seed=settings.data_seed, **size)
    Batches(len(data.train), settings.batch_size, torch.Generator())
    return data.provenance


def check(study: Study) -> None:
    """Raise :class:`UsageError` for whatever can be known to be wrong before the first run."""
    check_seeds(study.seeds)
    check_list("modes", study.modes)
    if study.trials < 1:
        raise UsageError(f"--trials is {study.trials}; give at least 1")
    specs = study.specs()
    for spec in specs:
        validate(spec.config)
    check_output(study)
    check_folders(specs)
    for weighting in dict.fromkeys(arm.weighting or study.settings.weighting for arm in study.arms):
        check_settings(replace(study.settings, weighting=weighting))
    if study.settings.task != Settings.task:
        check_base(study.settings, study.arms)
    search = study.search()
    if search is not None:
        check_folders(search.specs())


def check_seeds(seeds: Sequence[int]) -> None:
    """Raise :class:`UsageError` where ``--seeds`` is empty, or holds one twice or one that torch does not take."""
    check_list("seeds", seeds)
    for seed in seeds:
        if not 0 <= seed <= LARGEST_SEED:
            raise UsageError(f"--seeds: {seed} is no seed; give 0 to {LARGEST_SEED}")


def check_list(name: str, values: Sequence[object]) -> None:
    """Raise :class:`UsageError` where the list behind a flag is empty or holds something twice."""
    if not values:
        raise UsageError(f"--{name} is empty; give at least one")
    for value in values:
        if values.count(value) > 1:
            raise UsageError(f"--{name}: {value} is given twice; give each once")


def check_output(study: Study) -> None:
    """Refuse to replace results of another configuration, or ones that hold runs this study would drop."""
    if study.output.suffix != ".csv" or study.output.is_dir():
        raise UsageError(f"{study.output} is not the name of a .csv file; choose another --output")
    beside = study.output.with_suffix(".json")
    if not study.output.exists() and not beside.exists():
        return
    try:
        there = json.loads(beside.read_text(encoding="utf-8"))["config"]
        theirs = _as_run(there)
        dropped = [str(v) for key in ("modes", "seeds") for v in there[key] if v not in study.document()[key]]
    except (OSError, ValueError, KeyError, TypeError):
        raise UsageError(
            f"{study.output} has no {beside.name} of a study beside it; move it away or choose another output"
        ) from None
    changes = differences(theirs, _as_run(study.document()))
    if changes:
        raise UsageError(
            f"{study.output} belongs to another configuration: {'; '.join(changes)}; choose another output"
        )
    if dropped:
        raise UsageError(f"{study.output} also holds {', '.join(dropped)}; ask for them too or choose another output")


def _as_run(document: Mapping[str, Any]) -> RunConfig:
    known = to_json(RunConfig())
    return from_json({name: value for name, value in document.items() if name in known})


Draw = Callable[[Study, Sequence[Result]], Sequence[Path]]


def run_study(study: Study, flags: StudyFlags, draw: Draw | None = None) -> int:
    """Do the study, print its tables and ``draw`` its pictures, which gives their files; the exit code."""
    check(study)
    worker_count(flags.jobs)
    search = study.search()
    if flags.dry_run:
        return plan.show([*(search.specs() if search else ()), *study.specs()], flags.jobs, flags.json)
    if any(finished(spec) is None for spec in study.specs()):
        study = replace(study, source=prepare(study.settings))
    rows = complete(study, flags.jobs)
    results = study.output.with_suffix(".json")
    print(results.read_text(encoding="utf-8").rstrip() if flags.json else tables(rows, study.pairs(), study.metric))
    written = [results, *(draw(study, rows) if draw else ())]
    if not flags.json:
        print(f"\nwritten: {', '.join([str(study.output), *(file.name for file in written)])}")
    report_failures(rows)
    return 0


def report_failures(rows: Sequence[Result]) -> None:
    """Raise :class:`RunError` that counts the failed runs and names the first; nothing where all are ok."""
    failed = [row for row in rows if row["status"] != "ok"]
    if failed:
        first = f"{failed[0]['mode']} seed {failed[0]['seed']} {failed[0]['status']}"
        raise RunError(
            f"{len(failed)} of {len(rows)} runs failed, the first: {first}; the same command tries them again"
        )


def complete(study: Study, jobs: int) -> list[Result]:
    """Do what is left of the study, noting every run and writing the results after it; every row.

    Raises:
        RunError: another process is at this study.
    """
    with Ledger(study.folder) as ledger:
        check(study)  # once more: another process may have been here between the first look and now
        known = [row for spec in study.specs() if (row := finished(spec)) is not None]
        provenance = records.provenance(study.argv, study.start) | {"data": study.source}
        ledger.begin(study.output, study.document(), study.pairs(), provenance)
        for row in known:
            ledger.add(row)
        rows = _run_rest(study, jobs, ledger, len(known))
        if not records.holds(study.output, rows, study.metric):
            ledger.write_results()
    return rows


def _run_rest(study: Study, jobs: int, ledger: Ledger, known: int) -> list[Result]:
    search = study.search()
    trials, ended = (search.trials, search.ended()) if search else (0, 0)

    def keep(spec: Spec, row: Result) -> None:
        ledger.add(row)
        ledger.write_results()
        progress.done(spec, row)

    rows: dict[Path, Result] = {}

    def do(specs: Sequence[Spec]) -> None:
        done = run_all(specs, jobs, quiet=True, on_row=keep)
        rows.update(zip([spec.folder for spec in specs], done, strict=True))

    with Progress(trials + len(study.specs()), ended + known) as progress:
        # What waits for no search goes first: an arm that cannot run is met before hours of searching.
        do([spec for spec in study.specs() if spec.settled])
        if search is not None:
            study = replace(study, tuned=search.run(jobs, on_row=progress.done))
        left = [spec for spec in study.specs() if spec.folder not in rows]
        do([spec for spec in left if spec.settled])
        for spec in left:
            if not spec.settled:
                rows[spec.folder] = failed_row(spec, "the run that it replays did not finish")
                keep(spec, rows[spec.folder])
    return [rows[spec.folder] for spec in study.specs()]
