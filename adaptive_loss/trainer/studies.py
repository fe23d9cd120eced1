"""The engine of every study: a list of runs, done in parallel processes, each in its own folder, none done twice."""

from __future__ import annotations

import gc
import json
import os
import signal
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from adaptive_loss.errors import RunError, Stopped, UsageError
from adaptive_loss.locks import RUNNING, run_lock
from adaptive_loss.records import COLUMNS, Row, remove_leftovers
from adaptive_loss.trainer.stopping import Lead, StopRequest
from adaptive_loss.utils.config import RunConfig, core_count, differences, from_json

Result = dict[str, Any]
Run = Callable[..., Result]
OnRow = Callable[["Spec", Result], None]

CHECKPOINTS = "checkpoints"  # the folder of an unfinished run's last states
STOPPED = "stopped"  # a worker's word for a run that it has saved because it was asked to; never a row of results
WORKER_DIED = "the worker process died (killed, or out of memory); try fewer --jobs"


@dataclass(frozen=True)
class Spec:
    """One run of a study.

    Args:
        label: the arm's name in the results.
        config: what is trained.
        folder: where it is written.
        settled: whether ``config`` is what will be trained; weights that a search must find first are not.
    """

    label: str
    config: RunConfig
    folder: Path
    settled: bool = True


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
        Stopped: somebody asked for it; the runs that were under way are saved.
    """
    check_folders(specs)
    known = {spec.folder: finished(spec) for spec in specs}
    rows = {folder: row for folder, row in known.items() if row is not None}
    for folder in rows:
        _tidy(folder)

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


def _tidy(done: Path) -> None:
    """Remove what a kill between a run's result and its end has left."""
    if not any((done / name).exists() for name in (RUNNING, CHECKPOINTS)):
        return
    from adaptive_loss.checkpoint import Checkpoints

    with run_lock(done):
        Checkpoints(done / CHECKPOINTS).clear()


def worker_count(jobs: int) -> int:
    """Processes for ``--jobs``: 0 is one a core."""
    if jobs < 0:
        raise UsageError(f"--jobs is {jobs}; give 1 or more, or 0 for one a core")
    return jobs or core_count()


def check_folders(specs: Sequence[Spec]) -> None:
    """Raise :class:`UsageError` if a run's folder is a file or belongs to a run of another configuration."""
    for spec in (spec for spec in specs if spec.settled):
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
    """Does one run and turns what it raises into a row; travels to the worker processes.

    Args:
        run, quiet: as for :func:`run_all`.
        lead: of the study, in a worker process; there a request to stop is told in place of a row.
    """

    run: Run | None
    quiet: bool
    lead: Lead | None = None

    def __call__(self, spec: Spec) -> Result:
        if self.lead is not None and self.lead.file.exists():
            return {"status": STOPPED, "request": ("stopped before it began", 1)}
        spec.folder.mkdir(parents=True, exist_ok=True)
        with run_lock(spec.folder):
            return finished(spec) or self._row(spec)

    def _row(self, spec: Spec) -> Result:
        report = spec.folder / "error.txt"
        report.unlink(missing_ok=True)
        remove_leftovers(spec.folder)
        try:
            row = self._trainer()(spec.config, spec.folder, quiet=self.quiet)
            return {**row, "mode": spec.label}
        except UsageError:
            raise  # the same for every run, so the study stops and says so
        except Stopped as request:
            if self.lead is None:
                raise
            return {"status": STOPPED, "request": (str(request), request.code)}
        except Exception as error:
            report.write_text(traceback.format_exc(), encoding="utf-8")
            return failed_row(spec, reason(error))
        finally:
            # Optimizer and schedule refer to each other: a worker would hold some 40 MB of every run it has done.
            gc.collect()

    def _trainer(self) -> Run:
        if self.run is not None:
            return self.run
        from adaptive_loss.trainer import loop

        return loop.run if self.lead is None else partial(loop.run, lead=self.lead)


def reason(error: BaseException) -> str:
    """``error`` as one line of at most 200 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


def _in_processes(todo: Sequence[Spec], workers: int, one: _OneRun, keep: OnRow) -> None:
    """Do the runs in ``workers`` processes, and pass on to all of them a signal, or a request that one has heard."""
    heard: list[Stopped] = []
    with tempfile.TemporaryDirectory(prefix="adaptive_loss_") as place:
        lead = Lead(os.getpid(), Path(place) / "stop")

        def take(spec: Spec, row: Result) -> None:
            if row["status"] == STOPPED:
                heard.append(Stopped(*row["request"]))
                lead.file.touch()
            else:
                keep(spec, row)

        with StopRequest(tell=lead.file) as stop:
            _work_off({spec.folder: spec for spec in todo}, workers, replace(one, lead=lead), take)
            request = stop.asked() or next(iter(heard), None)
    if request is not None:
        raise request


def _work_off(left: dict[Path, Spec], workers: int, one: _OneRun, take: OnRow) -> None:
    """Do all that is ``left``; when a worker dies, find out which run it was at by doing its suspects alone."""
    while left:
        try:
            for spec, row in _pool(list(left.values()), workers, one):
                del left[spec.folder]
                take(spec, row)
        except BrokenProcessPool:
            if one.lead is not None and one.lead.file.exists():
                return  # a signal to all processes at once, which one of them was not ready for
            suspects = [spec for spec in left.values() if (spec.folder / RUNNING).exists()]
            if not suspects:
                raise RunError("the worker processes die before they begin a run; try --jobs 1") from None
            for spec in suspects:
                del left[spec.folder]
                take(spec, _alone(spec, one))


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
    # Ctrl-C reaches the whole group; the study hears it and tells its workers, which would else die with a traceback.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    row = one(spec)
    if one.lead is not None and one.lead.is_gone:
        os._exit(1)  # nobody is left to take the row, and the pool's worker would wait minutes for more to do
    return spec, row


def _read_json(path: Path) -> Result | None:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None
