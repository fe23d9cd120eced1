"""One training run, from its configuration to its folder."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import OneCycleLR

from adaptive_loss.checkpoint import Checkpoints, Stateful, gather, restore, save_file
from adaptive_loss.data import datasets
from adaptive_loss.data.base import Batches, Dataset
from adaptive_loss.errors import UsageError
from adaptive_loss.loss_executor import LossExecutor, StepRecord
from adaptive_loss.loss_monitor import LossMonitor
from adaptive_loss.modes import modes
from adaptive_loss.modes.base import Mode
from adaptive_loss.records import json_dump, provenance, write_atomic
from adaptive_loss.seeding import own_generator, seed_global
from adaptive_loss.tasks import tasks
from adaptive_loss.tasks.base import Task
from adaptive_loss.trainer.keeping import Keeper
from adaptive_loss.trainer.stopping import Lead, StopRequest
from adaptive_loss.trainer.studies import CHECKPOINTS
from adaptive_loss.utils.config import RunConfig, core_count, resolve_device, start_weights, to_json, validate
from adaptive_loss.utils.logging import Progress, RunLogger, progress
from adaptive_loss.utils.performance import Timer, peak_memory_mb, throughput

PEAK = 3.0
"""The one-cycle schedule rises from ``--lr`` to this many times it, then falls to almost 0."""
LOG_EVERY = 10


@dataclass
class Training:
    """Everything of one run that moves.

    Args:
        wall, timer: seconds of the whole run, and of its training steps alone.
        step: optimizer steps tried, applied or skipped.
        interventions: events so far.
        epoch_sums: term → sum and number of its losses in this epoch.
    """

    task: Task
    executor: LossExecutor
    optimizer: torch.optim.Optimizer
    scheduler: OneCycleLR
    batches: Batches
    autocast: AbstractContextManager[Any]
    wall: Timer = field(default_factory=Timer)
    timer: Timer = field(default_factory=Timer)
    step: int = 0
    interventions: int = 0
    epoch_sums: dict[str, list[float]] = field(default_factory=dict)

    @property
    def in_epoch(self) -> bool:
        """Whether an epoch is under way."""
        return self.step % len(self.batches) != 0

    def state_dict(self, log: RunLogger) -> dict[str, Any]:
        """What a checkpoint holds: all that moves, how far ``log`` has come, and the configuration."""
        seconds = [self.wall.seconds, self.timer.seconds]
        counters = {"step": self.step, "interventions": self.interventions, "epoch_sums": self.epoch_sums}
        return gather(self._parts(log), **counters, seconds=seconds) | {"config": to_json(self.task.config)}

    def load_state_dict(self, state: Mapping[str, Any], log: RunLogger) -> None:
        """Go on from :meth:`state_dict`, with ``log`` cut back to it."""
        counters = restore(state, self._parts(log))
        self.wall.before, self.timer.before = counters["seconds"]
        self.step, self.interventions = counters["step"], counters["interventions"]
        self.epoch_sums = counters["epoch_sums"]

    def _parts(self, log: RunLogger) -> dict[str, Stateful]:
        return {
            "model": self.task.model,
            "task": self.task,
            "executor": self.executor,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "batches": self.batches,
            "log": log,
        }


def run(config: RunConfig, folder: Path, *, quiet: bool = False, lead: Lead | None = None) -> dict[str, object]:
    """Train once and write ``config.json, metrics.csv, events.jsonl, result.json, checkpoint.pt, tb/`` to ``folder``.

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
        with training.wall, RunLogger(folder) as log:
            if state is not None:
                training.load_state_dict(state, log)
            with _shown(training, config, quiet) as bar:
                _train(training, config, log, bar, Keeper(checkpoints, config.save_every, stop))
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
        shutil.rmtree(folder / "tb", ignore_errors=True)
    return state


def prepare(config: RunConfig, data: Dataset) -> Training:
    """Build a run; every part draws from a generator of its own, so switching one on changes no other."""
    device = torch.device(resolve_device(config.device))
    mode: Mode = modes.get(config.mode)()
    kind: type[Task] = tasks.get(config.task)
    weights = start_weights(config, kind.terms)
    if kind.base is not None and weights[kind.base] == 0:
        raise UsageError(f"--weights {kind.base}=0: {kind.base} is the base term; give it a weight above 0")
    if mode.base_only:
        weights = {name: weight if name == kind.base else 0.0 for name, weight in weights.items()}
    seed_global(config.seed)
    wanted = [name for name, weight in weights.items() if weight > 0]
    task = kind(config, data, device, wanted=wanted, train=data.held_in if mode.all_data else None)
    n_train = len(task.splits["train"])
    batches = Batches(n_train, config.batch_size, own_generator(config.seed, "order"))
    total = config.epochs * len(batches)
    modulators = mode.modulators()
    executor = LossExecutor(
        weights,
        base=kind.base,
        weighting=config.weighting,
        modulators=modulators,
        probe=task.probe if modulators else None,
        total_steps=total,
        seed=config.seed,
    )
    optimizer = torch.optim.Adam([*task.model.parameters(), *executor.parameters()], lr=config.lr)
    scheduler = OneCycleLR(optimizer, PEAK * config.lr, total_steps=max(total, 2), div_factor=PEAK)
    return Training(task, executor, optimizer, scheduler, batches, _autocast(config.precision, device))


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
    task, executor = training.task, training.executor
    task.model.train()
    for rows in training.batches:
        with training.autocast:
            losses = task.losses(rows)
        training.optimizer.zero_grad()
        executor(losses, tap=task.tap if "gradients" in executor.weighting.needs else None).backward()
        record = executor.step(training.optimizer)
        task.after_step()
        training.scheduler.step()
        training.step += 1
        _log_step(training, record, log)
        bar.update(1, ", ".join(f"{name} {value:.3g}" for name, value in record.losses.items()))
        if training.in_epoch:
            between_steps()


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
        scalars |= {f"share/{name}": value for name, value in shares(record.losses, record.weights).items()}
        scalars |= {"gradient_norm": record.gradient_norm, "skipped_steps": training.executor.skipped_steps}
        scalars["interventions"] = training.interventions
        log.scalars(record.step, scalars)


def _log_events(training: Training, log: RunLogger) -> None:
    for event in training.executor.drain_events():
        training.interventions += 1
        log.event(event.step, event.kind, event.reason, **event.details)


def shares(losses: Mapping[str, float], weights: Mapping[str, float]) -> dict[str, float]:
    """Each term's share of Σⱼ wⱼ|Lⱼ|."""
    mass = {name: weights[name] * abs(value) for name, value in losses.items()}
    whole = sum(mass.values())
    return {name: value / whole if whole > 0 else 0.0 for name, value in mass.items()}


def _end_epoch(training: Training, log: RunLogger) -> None:
    """Measure the select split, tell the executor, and write the epoch's row."""
    task, executor, epoch = training.task, training.executor, training.step // len(training.batches)
    select = _measure(task, "select") if task.holds_out else {}
    means = {name: total / count for name, (total, count) in training.epoch_sums.items()}
    executor.end_epoch(**select)
    row: dict[str, float | int | str | None] = {"epoch": epoch, "step": executor.signals.step}
    row |= {f"loss_{name}": means.get(name) for name in task.terms}
    row |= {f"weight_{name}": executor.weights[name] for name in task.terms}
    row |= {f"share_{name}": shares(means, executor.weights).get(name) for name in task.terms}
    row |= {**select, "skipped_steps": executor.skipped_steps, "interventions": training.interventions}
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
        "skipped_steps": executor.skipped_steps,
        "interventions": training.interventions,
        "train_seconds": round(training.wall.seconds, 3),
    }
    monitors = [m.statistics() for m in executor.modulators if isinstance(m, LossMonitor)]
    return {
        **row,
        **metrics,
        "weights": executor.export(),
        "monitor": monitors[0] if monitors else None,
        "steps_per_second": round(throughput(executor.signals.step, training.timer.seconds), 2),
        "peak_memory_mb": round(peak_memory_mb(), 1),
        "precision": "bf16" if not isinstance(training.autocast, nullcontext) else "fp32",
        "device": task.device.type,
        "data": task.source,
    }


def _check_trained(training: Training, metrics: Mapping[str, float]) -> None:
    """Raise ``RuntimeError`` for a run that has come to its end and is none: it never stepped, or it ended in NaN."""
    if not training.executor.signals.step:
        raise RuntimeError(f"every one of its {training.executor.skipped_steps} steps was rejected")
    for name in ("test_loss", "select_loss"):
        if not math.isfinite(metrics.get(name, 0.0)):
            raise RuntimeError(f"the trained model's {name.replace('_', ' ')} is {metrics[name]}")


def _load(config: RunConfig) -> Dataset:
    size = {} if config.subset is None else {"subset": config.subset}
    return datasets.get(config.dataset)(config.data_dir, seed=config.data_seed, **size)


def _autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """bf16 autocast where it was asked for, or by itself where the processor computes in bf16."""
    wanted = precision == "bf16" or (precision == "auto" and has_bf16(device))
    return torch.autocast(device.type, torch.bfloat16) if wanted else nullcontext()


def has_bf16(device: torch.device) -> bool:
    """Whether the processor has bf16 arithmetic, not merely a slow emulation of it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


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
