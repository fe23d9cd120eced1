"""A study from its flags to its results: modes × seeds, the results files, the tables."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from adaptive_loss import records
from adaptive_loss.errors import RunError, UsageError
from adaptive_loss.ledger import Ledger
from adaptive_loss.modes import modes
from adaptive_loss.trainer import plan
from adaptive_loss.trainer.progress import Progress
from adaptive_loss.trainer.simple_ablation_analysis import PAIRS, compare, metric_of, printable, summarise
from adaptive_loss.trainer.studies import Result, Spec, check_folders, finished, run_all, worker_count
from adaptive_loss.trainer.tuning import find_weights, trial_specs
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

# A study's name for a mode, where the run itself is another mode: a phase-1 run calls the full system `adaptive`,
# and `tuned` and `customary` are the baseline with weights that a search found, or that the task says are usual.
RUN_AS = {"adaptive": "full", "tuned": "baseline", "customary": "baseline"}


def mode_name(given: str, flag: str) -> str:
    """A mode's own name, behind an alias or hyphens too; :class:`UsageError` names ``flag`` and the choices."""
    return modes.resolve(given, flag=flag, also=RUN_AS)


@dataclass(frozen=True, kw_only=True)
class StudyFlags(Settings):
    """What every study takes besides the settings of its runs."""

    seeds: tuple[int, ...] = (1, 42, 123)
    """Seeds; every mode runs each of them, paired."""
    jobs: int = 0
    """Runs at a time, each in its own process; 0 is one a core."""
    dry_run: bool = False
    """Show what would run, the time and the disk, and start nothing."""
    json: bool = False
    """Print one JSON document instead of tables."""
    config: Path | None = None
    """A JSON file of flags, such as those in experiments/; flags given here override it."""


@dataclass(frozen=True)
class Study:
    """Modes × seeds with common settings, written to ``output`` (a .csv) and the .json of the same stem."""

    settings: Settings
    modes: tuple[str, ...]
    seeds: tuple[int, ...]
    output: Path
    folder: Path
    trials: int = 24
    argv: tuple[str, ...] = ()
    start: float = field(default_factory=time.time)
    tuned: Mapping[str, float] | None = None
    source: Mapping[str, object] | None = None

    def specs(self) -> list[Spec]:
        """A run for every mode and seed, in the order of the results."""
        return [self._spec(mode, seed) for mode in self.modes for seed in self.seeds]

    def _spec(self, mode: str, seed: int) -> Spec:
        found = mode == "tuned" and self.tuned is not None
        weights = self.tuned if found and self.tuned else given_weights(self.settings, mode)
        config = run_config(self.settings, mode=RUN_AS.get(mode, mode), seed=seed, weights=dict(weights))
        return Spec(mode, config, self.folder / mode / f"seed_{seed}")

    def trial_specs(self) -> list[Spec]:
        """The runs that ``tuned`` needs before its own; none if the study has no such mode."""
        if "tuned" not in self.modes:
            return []
        return trial_specs(self._spec("tuned", 0).config, task_terms(self.settings), self.folder / "tuned", self.trials)

    def pairs(self) -> list[tuple[str, str]]:
        """The comparisons to make: every other mode with ``baseline``, then the full system with each control."""
        with_baseline = [(mode, "baseline") for mode in self.modes if mode != "baseline"]
        return with_baseline + [pair for pair in PAIRS if pair[1] != "baseline"]

    def document(self) -> dict[str, Any]:
        """The configuration that the results file records."""
        shared = {name: value for name, value in to_json(self.settings).items() if name in to_json(Settings())}
        return {**shared, "modes": list(self.modes), "seeds": list(self.seeds), "trials": self.trials}


def task_terms(settings: Settings) -> list[str]:
    """The names of the task's terms, the base first."""
    from adaptive_loss.tasks import tasks

    return list(tasks.get(settings.task).all_terms())


def given_weights(settings: Settings, mode: str) -> Mapping[str, float]:
    """The start weights of a mode's runs: those given, or the task's customary ones."""
    if mode != "customary":
        return settings.weights
    from adaptive_loss.tasks import tasks

    return tasks.get(settings.task).customary


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


def check_base(settings: Settings, names: Sequence[str]) -> None:
    """Raise :class:`UsageError` for a mode that trains on the base term alone, where the task has none."""
    from adaptive_loss.tasks import tasks

    alone = [name for name in names if modes.get(RUN_AS.get(name, name))().base_only]
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
    _check_list("modes", study.modes)
    if study.trials < 1:
        raise UsageError(f"--trials is {study.trials}; give at least 1")
    specs = study.specs()
    for spec in specs:
        validate(spec.config)
    check_output(study)
    check_folders([spec for spec in specs if spec.label != "tuned"])
    check_settings(study.settings)
    if study.settings.task != Settings.task:
        check_base(study.settings, study.modes)


def check_seeds(seeds: Sequence[int]) -> None:
    """Raise :class:`UsageError` where ``--seeds`` is empty, or holds one twice or one that torch does not take."""
    _check_list("seeds", seeds)
    for seed in seeds:
        if not 0 <= seed <= LARGEST_SEED:
            raise UsageError(f"--seeds: {seed} is no seed; give 0 to {LARGEST_SEED}")


def _check_list(name: str, values: Sequence[object]) -> None:
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


def run_study(study: Study, flags: StudyFlags) -> int:
    """Do the study and print its tables; the exit code."""
    check(study)
    worker_count(flags.jobs)
    if flags.dry_run:
        return plan.show([*study.trial_specs(), *study.specs()], flags.jobs, flags.json)
    if any(finished(spec) is None for spec in study.specs()):
        study = replace(study, source=prepare(study.settings))
    rows = complete(study, flags.jobs)
    if flags.json:
        print(study.output.with_suffix(".json").read_text(encoding="utf-8").rstrip())
    else:
        print(tables(study, rows))
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
        if not records.holds(study.output, rows):
            ledger.write_results()
    return rows


def _run_rest(study: Study, jobs: int, ledger: Ledger, known: int) -> list[Result]:
    trials = study.trial_specs()
    before = known + sum(finished(trial) is not None for trial in trials)

    def keep(spec: Spec, row: Result) -> None:
        ledger.add(row)
        ledger.write_results()
        progress.done(spec, row)

    with Progress(len(trials) + len(study.specs()), before) as progress:
        if trials:
            study = replace(study, tuned=_tuned_weights(study, jobs, progress))
        return run_all(study.specs(), jobs, quiet=True, on_row=keep)


def _tuned_weights(study: Study, jobs: int, progress: Progress) -> dict[str, float]:
    config, terms = study.trial_specs()[0].config, task_terms(study.settings)
    return find_weights(config, terms, study.folder / "tuned", study.trials, jobs, on_row=progress.done)


def tables(study: Study, rows: Sequence[Result]) -> str:
    """The study's means by mode and paired differences, as plain text."""
    metric = metric_of(rows)
    accuracy = metric == "test_accuracy"
    title, unit, scale = ("accuracy (%)", "percentage points", 100.0) if accuracy else ("loss", "nats", 1.0)
    lines = [f"{'mode':<18}{'n':>3}{'failed':>8}   test {title}, 95% interval"]
    for mode, entry in summarise(rows, metric).items():
        lines.append(f"{printable(mode):<18}{entry['n']:>3}{entry['failed']:>8}   {_mean(entry, scale)}")
    lines += ["", f"difference in {unit}, paired by seed, 95% interval"]
    pairs = compare(rows, study.pairs(), metric)
    lines += [f"{item['a'] + ' - ' + item['b']:<36}{_difference(item)}" for item in pairs]
    if len(study.seeds) < 5:
        lines.append("\nWarning: fewer than five seeds prove nothing")
    return "\n".join([*lines, f"\nwritten: {study.output} and {study.output.with_suffix('.json').name}"])


def _mean(entry: Mapping[str, Any], scale: float) -> str:
    if entry["mean"] is None:
        return "none finished"
    ends = entry["interval95"]
    return f"{scale * entry['mean']:.2f}" + (f"  [{scale * ends[0]:.2f}, {scale * ends[1]:.2f}]" if ends else "")


def _difference(item: Mapping[str, Any]) -> str:
    if item["difference"] is None:
        return "no seed finished in both"
    ends, p = item["interval95"], item["p"]
    interval = f"  [{ends[0]:+.2f}, {ends[1]:+.2f}]" if ends else ""
    return f"{item['difference']:+.2f}{interval}" + (f"  p {p:.3g}" if p is not None else "")
