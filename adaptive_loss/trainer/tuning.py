"""The tuned baseline: the best fixed weights that a seeded search of full-length runs finds.

The search is Optuna's tree-structured Parzen estimator (Bergstra et al. 2011), asked for a batch of constant size at a
time. What it asks for follows from the seed and the results of the batches before, and from nothing else: neither the
number of processes nor where a search was cut changes what is found. ``trials.json`` holds every trial; Optuna's study
is made again from it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptive_loss.errors import RunError, UsageError
from adaptive_loss.locks import run_lock
from adaptive_loss.records import json_dump, write_atomic
from adaptive_loss.trainer.studies import OnRow, Result, Run, Spec, finished, run_all
from adaptive_loss.utils.config import RunConfig, Settings, differences, from_json, run_config, to_json

if TYPE_CHECKING:
    from optuna import Study as OptunaStudy
    from optuna.distributions import BaseDistribution

    from adaptive_loss.tasks.base import Task

TUNING_SEED = 0  # of the search and of its runs: none of the studies' own seeds, so that tuning never sees theirs
LOWEST, HIGHEST = 1e-3, 10.0
"""A trial's weights are log-uniform between these multiples of the usual ones."""
BATCH = 4
"""Trials asked for at a time. Fewer find more with as many trials, more keep more cores busy."""
STARTUP = 2 * BATCH
"""Trials drawn at random before the estimator has enough to learn from."""
FILE_NAME = "trials.json"
Record = dict[str, Any]


@dataclass(frozen=True)
class Space:
    """What is searched.

    Args:
        held: the terms that keep their weight: the base, an opponent's first, and those that are off.
        around: the terms that are searched, with the usual weight that their ranges lie around.
    """

    held: Mapping[str, float]
    around: Mapping[str, float]


def space_of(kind: type[Task], given: Mapping[str, float]) -> Space:
    """The space around a task's customary weights, where it has any, and around the ``given`` ones, else 1.

    Raises:
        UsageError: no term is left to be searched.
    """
    start = {name: float(given.get(name, 1.0)) for name in kind.all_terms()}
    usual = {name: kind.customary.get(name) or weight for name, weight in start.items()}
    firsts = {kind.terms[0], *(opponent.terms[0] for opponent in kind.opponents)}
    held = {name: usual[name] if start[name] else 0.0 for name in start if name in firsts or not start[name]}
    if len(held) == len(start):
        raise UsageError("there is no weight to search: give a term besides the base a start weight above 0")
    return Space(held, {name: usual[name] for name in start if name not in held})


@dataclass(frozen=True)
class Search:
    """A search for fixed weights: ``trials`` runs of ``baseline`` at full length, with the test split unread.

    Args:
        base: the runs' settings; mode, seed and weights are replaced.
        space: what is searched.
        metric: what of the task's metrics on the select split decides; ``accuracy`` is raised, all else lowered.
        folder: where ``trials/trial_XX/`` and ``trials.json`` go.
        trials: how many.
    """

    base: RunConfig
    space: Space
    metric: str
    folder: Path
    trials: int = 24

    @property
    def file(self) -> Path:
        """Where the trials that have ended are kept."""
        return self.folder / FILE_NAME

    def specs(self) -> list[Spec]:
        """The runs of the search; those after the next batch are not settled, since their weights are unknown."""
        records = self.records()
        known = [record["weights"] for record in records] + self._next(records)
        later = [replace(self._spec(i, {}), settled=False) for i in range(len(known), self.trials)]
        return [*(self._spec(i, weights) for i, weights in enumerate(known)), *later]

    def ended(self) -> int:
        """How many trials need not be done any more."""
        known = len(self.records())
        return known + sum(finished(spec) is not None for spec in self.specs()[known:])

    def _spec(self, number: int, weights: Mapping[str, float]) -> Spec:
        config = replace(self.base, mode="baseline", seed=TUNING_SEED, read_test=False, weights=dict(weights))
        label = f"trial_{number:02d}"
        return Spec(label, config, self.folder / "trials" / label)

    def _next(self, records: Sequence[Record]) -> list[dict[str, float]]:
        """The weights to try next: the rest of the batch that ``records`` end in, or the whole one after them."""
        if len(records) >= self.trials:
            return []
        before = len(records) // BATCH * BATCH
        return self.ask(records[:before])[len(records) - before : self.trials - before]

    def ask(self, records: Sequence[Record]) -> list[dict[str, float]]:
        """The ``BATCH`` weightings that follow whole batches of ``records``; the very first is the usual weights."""
        study = self.study(records)
        if not records:
            study.enqueue_trial(dict(self.space.around))
        asked = [study.ask(self._distributions()) for _ in range(BATCH)]
        return [{**self.space.held, **trial.params} for trial in asked]

    def study(self, records: Sequence[Record]) -> OptunaStudy:
        """Optuna's study of these trials, in memory: its value is to be lowered, a failed one's is infinite."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)  # it announces every study that is made
        sampler = optuna.samplers.TPESampler(
            seed=TUNING_SEED + len(records), n_startup_trials=STARTUP, multivariate=True, constant_liar=True
        )
        study = optuna.create_study(sampler=sampler)
        ranges = self._distributions()
        for record in records:
            params = {name: record["weights"][name] for name in ranges}
            study.add_trial(optuna.trial.create_trial(params=params, distributions=ranges, value=self._lowest(record)))
        return study

    def _distributions(self) -> dict[str, BaseDistribution]:
        from optuna.distributions import FloatDistribution

        return {name: FloatDistribution(low, high, log=True) for name, (low, high) in self._ranges().items()}

    def _ranges(self) -> dict[str, tuple[float, float]]:
        return {name: (LOWEST * weight, HIGHEST * weight) for name, weight in self.space.around.items()}

    def run(
        self, jobs: int = 0, *, quiet: bool = True, run: Run | None = None, on_row: OnRow | None = None
    ) -> dict[str, float]:
        """The weights that are best on the select split; a tie goes to the lower select loss, then to the earlier.

        Trials that have ended, failed ones too, are not done again. The other arguments are as for
        :func:`~adaptive_loss.trainer.studies.run_all`.

        Raises:
            UsageError: the folder is another search's.
            RunError: no trial finished, or another process is at this search.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with run_lock(self.folder):
            records = self.records()
            while len(records) < self.trials:
                specs = [self._spec(len(records) + i, weights) for i, weights in enumerate(self._next(records))]
                rows = run_all(specs, jobs, quiet, run=run, on_row=on_row)
                records += [self._record(spec, row) for spec, row in zip(specs, rows, strict=True)]
                write_atomic(self.file, json_dump(self._document(records)))
        ranked = self.ranked(records)
        if not ranked:
            raise RunError(
                f"none of the {self.trials} tuning trials finished; their tracebacks are in {self.folder / 'trials'}"
            )
        return ranked[0]["weights"]

    def ranked(self, records: Sequence[Record] | None = None) -> list[Record]:
        """The trials that finished, by default of those on disk, the best first."""
        records = self.records() if records is None else records
        return sorted((record for record in records if math.isfinite(self._lowest(record))), key=self._rank)

    def records(self) -> list[Record]:
        """The trials that have ended, in order; none where none of them finished, so that all are tried again.

        Raises:
            UsageError: the file is damaged, another search's, or holds more trials than are asked for.
        """
        if not self.file.exists():
            return []
        try:
            there = json.loads(self.file.read_text(encoding="utf-8"))
            records = there["trials"]
            alike = {name: there.get(name) for name in self._identity()} == json.loads(json_dump(self._identity()))
            changes = differences(from_json(there["config"]), self.base) if alike else ["its sampler, space or metric"]
            sound = bool(changes) or all(map(self._is_sound, records))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            changes, sound, records = [], False, []
        if changes:
            raise UsageError(
                f"{self.file} belongs to another search: {'; '.join(changes)}; choose another output folder"
            )
        if not sound:
            raise UsageError(f"{self.file} is damaged; move it away, and its finished runs are read again")
        if len(records) > self.trials:
            raise UsageError(f"{self.file} holds {len(records)} trials; give --trials {len(records)} or more")
        return records if self.ranked(records) else []

    def _is_sound(self, record: Record) -> bool:
        """Whether it is a trial that this search could have made: the file may come from anyone."""
        weights, values = record["weights"], (record[f"select_{self.metric}"], record["select_loss"])
        within = all(low <= weights[name] <= high for name, (low, high) in self._ranges().items())
        held = {name: weights[name] for name in self.space.held} == self.space.held
        named = isinstance(record["trial"], str) and isinstance(record["status"], str)
        return within and held and named and all(value is None or math.isfinite(value) for value in values)

    def _identity(self) -> Record:
        sampler = {"sampler": "tpe", "seed": TUNING_SEED, "batch": BATCH}
        return {**sampler, "metric": self.metric, "space": asdict(self.space)}

    def _document(self, records: Sequence[Record]) -> Record:
        best = next(iter(self.ranked(records)), None)
        chosen = {"chosen": best and best["trial"], "weights": best and best["weights"]}
        return {**self._identity(), "config": to_json(self.base), **chosen, "trials": records}

    def _record(self, spec: Spec, row: Result) -> Record:
        measured = {name: row.get(name) for name in (f"select_{self.metric}", "select_loss")}
        return {"trial": spec.label, "weights": spec.config.weights, "status": row["status"], **measured}

    def _rank(self, record: Record) -> tuple[float, float]:
        loss = record["select_loss"]
        return self._lowest(record), math.inf if loss is None else loss

    def _lowest(self, record: Record) -> float:
        """What is to be lowered; infinite for a trial that failed or could not be measured."""
        value = record[f"select_{self.metric}"] if record["status"] == "ok" else None
        return math.inf if value is None else -value if self.metric == "accuracy" else value


def search_for(settings: Settings, folder: Path, trials: int = 24) -> Search:
    """The search for the fixed weights of a task, with the settings of a study's runs."""
    from adaptive_loss.tasks import tasks

    kind = tasks.get(settings.task)
    base = run_config(settings, mode="baseline", seed=TUNING_SEED, weights={})
    return Search(base, space_of(kind, settings.weights), kind.metric, folder, trials)


def read_tuned(file: Path, task: str) -> dict[str, float]:
    """The weights that a search of ``task`` chose, from its ``trials.json``.

    Raises:
        UsageError: the file holds no such weights.
    """
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        weights = {str(name): float(weight) for name, weight in document["weights"].items()}
        there = str(document["config"]["task"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UsageError(f"--tuned {file} holds no weights; name the {FILE_NAME} of a finished search") from None
    if there != task:
        raise UsageError(f"--tuned {file} is of task {there}, not {task}; name the {FILE_NAME} of a search of {task}")
    return weights
