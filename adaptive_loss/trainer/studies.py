"""The engine of every study: a list of runs, done in parallel processes, each in its own folder, none done twice."""

from __future__ import annotations

import gc
import json
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from adaptive_loss.errors import RunError, UsageError
from adaptive_loss.records import COLUMNS, Row
from adaptive_loss.utils.config import RunConfig, core_count, differences, from_json

Result = dict[str, Any]
Run = Callable[..., Result]
OnRow = Callable[["Spec", Result], None]

RUNNING = "running"  # a file of this name marks a run that a process is at, so that a dead one can be told
WORKER_DIED = "the worker process died (killed, or out of memory); try fewer --jobs"


@dataclass(frozen=True)
class Spec:
    """One run of a study: the mode's name in the results, what is trained, and where it is written."""

    label: str
    config: RunConfig
    folder: Path


def run_all(
    specs: Sequence[Spec], jobs: int = 0, quiet: bool = False, *, run: Run | None = None, on_row: OnRow | None = None
) -> list[Result]:
    """Do every run of ``specs`` that is not done yet and give back a row for each, in their order.

    Args:
        specs: the runs; every folder is checked before anything starts.
        jobs: worker processes; 0 is one a core, 1 runs in this process.
        quiet: no output from the runs themselves.
        run: trains one run; by default :func:`adaptive_loss.trainer.loop.run`.
        on_row: called in this process with every new row as soon as it is there.

    Raises:
        UsageError: a folder belongs to another configuration, or a run found its configuration unusable.
    """
    check_folders(specs)
    known = {spec.folder: finished(spec) for spec in specs}
    rows = {folder: row for folder, row in known.items() if row is not None}

    def keep(spec: Spec, row: Result) -> None:
        rows[spec.folder] = row
        if on_row is not None:
            on_row(spec, row)

    todo = [spec for spec in specs if spec.folder not in rows]
    workers = min(worker_count(jobs), len(todo))
    one = _OneRun(run, quiet or workers > 1)
    if workers > 1:
        _in_processes(todo, workers, one, keep)
    else:
        for spec in todo:
            keep(spec, one(spec))
    return [rows[spec.folder] for spec in specs]


def worker_count(jobs: int) -> int:
    """Processes for ``--jobs``: 0 is one a core."""
    if jobs < 0:
        raise UsageError(f"--jobs is {jobs}; give 1 or more, or 0 for one a core")
    return jobs or core_count()


def check_folders(specs: Sequence[Spec]) -> None:
    """Raise :class:`UsageError` if a run's folder is a file or belongs to a run of another configuration."""
    for spec in specs:
        for part in (spec.folder, *spec.folder.parents):
            if part.exists() and not part.is_dir():
                raise UsageError(f"{part} is a file, not a folder; choose another output folder or file")
        there = stored_config(spec.folder)
        changes = differences(there, spec.config) if there is not None else []
        if changes:
            what = "; ".join(changes)
            raise UsageError(f"{spec.folder} belongs to another configuration: {what}; choose another --output_dir")


def stored_config(folder: Path) -> RunConfig | None:
    """The configuration of the run in ``folder``; None where no run has begun there."""
    if not any((folder / name).exists() for name in ("metrics.csv", "result.json", "checkpoint.pt")):
        return None
    values = _read_json(folder / "config.json")
    if values is None:
        raise UsageError(
            f"{folder} holds a run whose config.json is missing or damaged; move it or choose another folder"
        )
    try:
        return from_json(values)
    except UsageError as error:
        raise UsageError(f"{folder / 'config.json'}: {error}; move that folder or choose another") from None


def finished(spec: Spec) -> Result | None:
    """The row of a run that is done, or None; a damaged result counts as not done, so it is done again."""
    row = _read_json(spec.folder / "result.json")
    if row is None or not _is_whole(row, spec.config.seed) or stored_config(spec.folder) is None:
        return None
    return {**row, "mode": spec.label}


def _is_whole(row: Result, seed: int) -> bool:
    """Whether a stored result is of a run that finished with ``seed`` and has every cell of a results file."""
    cells = [row.get(name, "") for name in COLUMNS if name not in ("mode", "status")]
    return (row.get("status"), row.get("seed")) == ("ok", seed) and not any(
        isinstance(cell, (str, bool, list, dict)) for cell in cells
    )


def failed_row(spec: Spec, reason: str) -> Result:
    """The row of a run that failed: it is counted, never missing."""
    return Row.failed(spec.label, spec.config.seed, reason, epochs=spec.config.epochs).as_dict()


@dataclass(frozen=True)
class _OneRun:
    """Does one run and turns what it raises into a row; travels to the worker processes."""

    run: Run | None
    quiet: bool

    def __call__(self, spec: Spec) -> Result:
        spec.folder.mkdir(parents=True, exist_ok=True)
        marker, report = spec.folder / RUNNING, spec.folder / "error.txt"
        marker.touch()
        report.unlink(missing_ok=True)
        try:
            row = self._trainer()(spec.config, spec.folder, quiet=self.quiet)
            return {**row, "mode": spec.label}
        except UsageError:
            raise  # the same for every run, so the study stops and says so
        except Exception as error:
            report.write_text(traceback.format_exc(), encoding="utf-8")
            return failed_row(spec, reason(error))
        finally:
            marker.unlink(missing_ok=True)
            # Optimizer and schedule refer to each other: a worker would hold some 40 MB of every run it has done.
            gc.collect()

    def _trainer(self) -> Run:
        if self.run is not None:
            return self.run
        from adaptive_loss.trainer import loop

        return loop.run


def reason(error: BaseException) -> str:
    """``error`` as one line of at most 200 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


def _in_processes(todo: Sequence[Spec], workers: int, one: _OneRun, keep: OnRow) -> None:
    """Do the runs in ``workers`` processes; when one dies, find out which run it was by doing its suspects alone."""
    left = {spec.folder: spec for spec in todo}
    while left:
        try:
            for spec, row in _pool(list(left.values()), workers, one):
                del left[spec.folder]
                keep(spec, row)
        except BrokenProcessPool:
            suspects = [spec for spec in left.values() if (spec.folder / RUNNING).exists()]
            if not suspects:
                raise RunError("the worker processes die before they begin a run; try --jobs 1") from None
            for spec in suspects:
                del left[spec.folder]
                keep(spec, _alone(spec, one))


def _alone(spec: Spec, one: _OneRun) -> Result:
    try:
        return next(row for _, row in _pool([spec], 2, one))
    except BrokenProcessPool:
        (spec.folder / RUNNING).unlink(missing_ok=True)
        (spec.folder / "error.txt").write_text(WORKER_DIED + "\n", encoding="utf-8")
        return failed_row(spec, WORKER_DIED)


def _pool(specs: Sequence[Spec], workers: int, one: _OneRun) -> Iterator[tuple[Spec, Result]]:
    from joblib import Parallel, delayed, parallel_config

    threads = specs[0].config.threads or None
    with parallel_config(backend="loky", inner_max_num_threads=threads):
        # one run a batch, so that a dead worker takes no finished run with it
        work = Parallel(n_jobs=workers, batch_size=1, return_as="generator_unordered")  # pyright: ignore[reportArgumentType]
        yield from cast("Iterator[tuple[Spec, Result]]", work(delayed(_with_spec)(one, spec) for spec in specs))


def _with_spec(one: _OneRun, spec: Spec) -> tuple[Spec, Result]:
    return spec, one(spec)


def _read_json(path: Path) -> Result | None:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None
