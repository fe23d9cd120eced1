"""One training run, from its configuration to its folder."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adaptive_loss.checkpoint import Checkpoints, save_file
from adaptive_loss.data import datasets
from adaptive_loss.data.base import Dataset
from adaptive_loss.data.points import PointDataset
from adaptive_loss.errors import UsageError
from adaptive_loss.loss_executor import StepRecord
from adaptive_loss.loss_monitor import LossMonitor
from adaptive_loss.records import json_dump, provenance, write_atomic
from adaptive_loss.tasks.base import Task
from adaptive_loss.trainer.keeping import Keeper
from adaptive_loss.trainer.stopping import Lead, StopRequest
from adaptive_loss.trainer.studies import CHECKPOINTS
from adaptive_loss.trainer.training import Training, prepare
from adaptive_loss.utils.config import RunConfig, core_count, to_json, validate
from adaptive_loss.utils.logging import PICTURES, Progress, RunLogger, progress
from adaptive_loss.utils.performance import peak_memory_mb, throughput
from adaptive_loss.utils.pictures import grid

LOG_EVERY = 10


def run(config: RunConfig, folder: Path, *, quiet: bool = False, lead: Lead | None = None) -> dict[str, object]:
    """Train once and write ``config.json, metrics.csv, events.jsonl, result.json, checkpoint.pt, tb/`` to ``folder``,
    and ``pictures/`` where the task has some.

    While it trains, ``checkpoints/`` holds the last two states, and an unfinished run that is there goes on from the
    newest, bit for bit, unless ``config.resume`` is off. The test split is read once, at the end, with the last epoch's
    model; not at all where ``read_test`` is off.

    Args:
        config: what to train.
        folder: where to; what a run left there that does not go on is replaced.
        quiet: no progress.
        lead: of the study whose worker this process is.

    Returns:
        The row of the results file, and the task's other metrics.

    Raises:
        UsageError: the configuration cannot be trained.
        Stopped: somebody asked the run to end; it is saved.
        RuntimeError: training failed: the executor gave up, and says at which term.
    """
    validate(config)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "config.json", json_dump(to_json(config)))
    checkpoints = Checkpoints(folder / CHECKPOINTS)
    files = [] if config.preempt_file is None else [config.preempt_file]
    with _threads(config.threads), StopRequest(files, lead=lead) as stop:
        training = prepare(config, _load(config))
        state = _begin(folder, checkpoints, config.resume)
        with _given_up_unless_begun(training, folder, checkpoints), training.wall, RunLogger(folder) as log:
            if state is not None:
                training.load_state_dict(state, log)
            with _shown(training, config, quiet) as bar:
                _train(training, config, log, bar, Keeper(checkpoints, config.save_every, stop))
            _show(training, log, training.executor.signals.step)
            result = _result(config, training)
            manifest = save_file(folder / "checkpoint.pt", training.state_dict(log))
        # A folder with a result is a finished run.
        origin = {**provenance(sys.argv), "checkpoint": manifest}
        write_atomic(folder / "result.json", json_dump({**result, "provenance": origin}))
        checkpoints.clear()
        request = stop.asked()
        if request is not None:
            raise request
    return result


def _begin(folder: Path, checkpoints: Checkpoints, resume: bool) -> dict[str, Any] | None:
    """The state to go on from; without one, what an earlier run left in ``folder`` is removed."""
    state = checkpoints.load() if resume else None
    if state is None:
        checkpoints.clear()
        for stale in ("result.json", "checkpoint.pt", "metrics.csv", "events.jsonl"):
            (folder / stale).unlink(missing_ok=True)
        for stale in ("tb", PICTURES):
            shutil.rmtree(folder / stale, ignore_errors=True)
    return state


@contextmanager
def _given_up_unless_begun(training: Training, folder: Path, checkpoints: Checkpoints) -> Iterator[None]:
    """A configuration that its first step refuses leaves ``folder`` free for the one that its user meant."""
    try:
        yield
    except UsageError:
        if not training.step:
            _begin(folder, checkpoints, resume=False)
        raise


def _train(training: Training, config: RunConfig, log: RunLogger, bar: Progress, keeper: Keeper) -> None:
    """The epochs that are left; saves between steps, but not between an epoch's last step and its row."""

    def keep() -> None:
        keeper.between_steps(training.step, lambda: training.state_dict(log))

    while training.step < config.epochs * len(training.batches):
        with training.timer:
            train_epoch(training, log, bar, keep)
        _end_epoch(training, log)
        keep()


def train_epoch(
    training: Training, log: RunLogger, bar: Progress, between_steps: Callable[[], None] = lambda: None
) -> None:
    """One pass over the training split, or what is left of it."""
    for learner in training.learners:
        learner.network.train()
    for rows in training.batches:
        record = _step(training, rows)
        training.step += 1
        _log_step(training, record, log)
        bar.update(1, ", ".join(f"{name} {value:.3g}" for name, value in record.losses.items()))
        if training.in_epoch:
            between_steps()


def _step(training: Training, rows: Tensor) -> StepRecord:
    """A step of every network, the opponents first: of the model's record, the losses and weights are all of theirs."""
    task, losses, weights = training.task, {}, {}
    for name, opponent in training.opponents.items():
        with training.autocast:
            theirs = task.opponent_losses(name, rows)
        record = opponent.learn(theirs)
        losses |= record.losses
        weights |= record.weights
    with training.autocast:
        own = task.losses(rows)
    record = training.learner.learn(own, task.tap if "gradients" in training.executor.weighting.needs else None)
    for event in task.after_step() or ():
        training.executor.report(event)
    return replace(record, losses={**record.losses, **losses}, weights={**record.weights, **weights})


def _log_step(training: Training, record: StepRecord, log: RunLogger) -> None:
    for name, value in record.losses.items():
        sums = training.epoch_sums.setdefault(name, [0.0, 0.0])
        sums[0] += value
        sums[1] += 1
    _log_events(training, log)
    # A skipped step has the number of the one before: its curves would be drawn twice after a resume in between.
    if record.applied and record.step % LOG_EVERY == 0:
        scalars = {f"loss/{name}": value for name, value in record.losses.items()}
        scalars |= {f"weight/{name}": value for name, value in record.weights.items()}
        scalars |= {f"share/{name}": value for name, value in training.shares(record.losses).items()}
        scalars |= {"gradient_norm": record.gradient_norm, "skipped_steps": training.skipped_steps}
        scalars["interventions"] = training.interventions
        log.scalars(record.step, scalars)
    every = training.task.config.pictures_every
    if record.applied and every and record.step % every == 0:
        _show(training, log, record.step)


def _show(training: Training, log: RunLogger, step: int) -> None:
    """Write the task's pictures, each set as one."""
    for name, images in training.task.pictures().items():
        log.picture(step, name, grid(images))


def _log_events(training: Training, log: RunLogger) -> None:
    for learner in training.learners:
        for event in learner.executor.drain_events():
            training.interventions += 1
            log.event(event.step, event.kind, event.reason, **event.details)


def _end_epoch(training: Training, log: RunLogger) -> None:
    """Measure the select split, tell the executor, and write the epoch's row."""
    task, executor, epoch = training.task, training.executor, training.step // len(training.batches)
    select = _measure(task, "select") if task.holds_out else {}
    means = {name: total / count for name, (total, count) in training.epoch_sums.items()}
    executor.end_epoch(**select)
    row: dict[str, float | int | str | None] = {"epoch": epoch, "step": executor.signals.step}
    for prefix, values in (("loss", means), ("weight", training.weights), ("share", training.shares(means))):
        row |= {f"{prefix}_{name}": values.get(name) for name in task.all_terms()}
    row |= {**select, "skipped_steps": training.skipped_steps, "interventions": training.interventions}
    log.epoch(row)
    log.scalars(executor.signals.step, {name.replace("_", "/", 1): value for name, value in select.items()})
    _log_events(training, log)  # a checkpoint holds none that wait
    training.epoch_sums = {}


def _measure(task: Task, split: str) -> dict[str, float]:
    return {f"{split}_{name}": value for name, value in task.evaluate(split).items()}


def _result(config: RunConfig, training: Training) -> dict[str, object]:
    """The contract's row, the task's other metrics, and what monitor and executor have to say."""
    task, executor = training.task, training.executor
    metrics = (_measure(task, "select") if task.holds_out else {}) | (
        _measure(task, "test") if config.read_test else {}
    )
    _check_trained(training, metrics)
    row: dict[str, object] = {
        "mode": config.mode,
        "seed": config.seed,
        "status": "ok",
        "epochs": config.epochs,
        "steps": executor.signals.step,
        "test_accuracy": metrics.pop("test_accuracy", None),
        "test_loss": metrics.pop("test_loss", None),
        "select_accuracy": metrics.pop("select_accuracy", None),
        "skipped_steps": training.skipped_steps,
        "interventions": training.interventions,
        "train_seconds": round(training.wall.seconds, 3),
    }
    monitors = [{**m.statistics(), **m.summary()} for m in executor.modulators if isinstance(m, LossMonitor)]
    return {
        **row,
        **metrics,
        "rule": executor.weighting.name,
        "weights": executor.export(),
        "monitor": monitors[0] if monitors else None,
        "steps_per_second": round(throughput(executor.signals.step, training.timer.seconds), 2),
        "peak_memory_mb": round(peak_memory_mb(), 1),
        "precision": "bf16" if not isinstance(training.autocast, nullcontext) else "fp32",
        "device": task.device.type,
        **({"collapsed_opponents": dict(task.collapsed)} if task.opponents else {}),
        **({"unreached_targets": executor.unreached} if executor.terms.targets else {}),
        "data": task.source,
    }


def _check_trained(training: Training, metrics: Mapping[str, float]) -> None:
    """Raise ``RuntimeError`` for a run that has come to its end and is none: it never stepped, or it ended in NaN."""
    if not training.executor.signals.step:
        raise RuntimeError(f"every one of its {training.executor.skipped_steps} steps was rejected")
    for name in ("test_loss", "select_loss"):
        if not math.isfinite(metrics.get(name, 0.0)):
            raise RuntimeError(f"the trained model's {name.replace('_', ' ')} is {metrics[name]}")


def _load(config: RunConfig) -> Dataset | PointDataset:
    size = {} if config.subset is None else {"subset": config.subset}
    return datasets.get(config.dataset)(config.data_dir, seed=config.data_seed, **size)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """``count`` threads for the run (0: one a core), and the caller's number again after it."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or core_count())
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _shown(training: Training, config: RunConfig, quiet: bool) -> Iterator[Progress]:
    total, name = config.epochs * len(training.batches), f"{config.mode} seed {config.seed}"
    with nullcontext(_Silent()) if quiet else progress(total, name) as bar:
        if training.step:
            bar.update(training.step, f"going on from step {training.step}")
        yield bar


class _Silent:
    """A progress that shows nothing."""

    def update(self, n: int = 1, text: str = "") -> None:
        """Nothing."""
