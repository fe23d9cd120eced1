"""One training run, from its configuration to its folder."""

from __future__ import annotations

import io
import math
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import OneCycleLR

from adaptive_loss.data import datasets
from adaptive_loss.data.base import Batches, Dataset
from adaptive_loss.errors import UsageError
from adaptive_loss.loss_executor import LossExecutor, StepRecord
from adaptive_loss.loss_monitor import LossMonitor
from adaptive_loss.modes import modes
from adaptive_loss.modes.base import Mode
from adaptive_loss.records import json_dump, provenance, write_atomic
from adaptive_loss.seeding import own_generator
from adaptive_loss.tasks import tasks
from adaptive_loss.tasks.base import Task
from adaptive_loss.utils.config import RunConfig, core_count, resolve_device, start_weights, to_json, validate
from adaptive_loss.utils.logging import Progress, RunLogger, progress
from adaptive_loss.utils.performance import Timer, peak_memory_mb, throughput

PEAK = 3.0
"""The one-cycle schedule rises from ``--lr`` to this many times it, then falls to almost 0."""
LOG_EVERY = 10


@dataclass
class Training:
    """Everything of one run that moves."""

    task: Task
    executor: LossExecutor
    optimizer: torch.optim.Optimizer
    scheduler: OneCycleLR
    batches: Batches
    autocast: AbstractContextManager[Any]
    timer: Timer = field(default_factory=Timer)
    interventions: int = 0
    epoch_sums: dict[str, list[float]] = field(default_factory=dict)

    def state_dict(self) -> dict[str, Any]:
        """What ``checkpoint.pt`` holds; loads with ``weights_only=True``."""
        return {
            "format": 1,
            "model": self.task.model.state_dict(),
            "task": self.task.state_dict(),
            "executor": self.executor.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "batches": self.batches.state_dict(),
            "generator": torch.get_rng_state(),
        }


def run(config: RunConfig, folder: Path, *, quiet: bool = False) -> dict[str, object]:
    """Train once and write ``config.json, metrics.csv, events.jsonl, result.json, checkpoint.pt, tb/`` to ``folder``.

    The test split is read once, at the end, with the last epoch's model; not at all where ``read_test`` is off.

    Args:
        config: what to train.
        folder: where to; what an unfinished run left there is replaced.
        quiet: no progress.

    Returns:
        The row of the results file, and the task's other metrics.

    Raises:
        UsageError: the configuration cannot be trained.
        RuntimeError: training failed: the executor gave up, and says at which term.
    """
    started = time.perf_counter()
    validate(config)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "config.json", json_dump(to_json(config)))
    with _threads(config.threads):
        training = prepare(config, _load(config))
        for stale in ("metrics.csv", "events.jsonl"):
            (folder / stale).unlink(missing_ok=True)
        total = config.epochs * len(training.batches)
        with RunLogger(folder) as log, _shown(total, config, quiet) as bar:
            for epoch in range(1, config.epochs + 1):
                with training.timer:
                    train_epoch(training, log, bar)
                _end_epoch(training, epoch, log)
        result = _result(config, training, time.perf_counter() - started)
    _save(folder, config, training, result)
    return result


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
    torch.manual_seed(config.seed)
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


def train_epoch(training: Training, log: RunLogger, bar: Progress) -> None:
    """One pass over the training split."""
    task, executor = training.task, training.executor
    training.epoch_sums = {}
    task.model.train()
    for rows in training.batches:
        with training.autocast:
            losses = task.losses(rows)
        training.optimizer.zero_grad()
        executor(losses, tap=task.tap if "gradients" in executor.weighting.needs else None).backward()
        record = executor.step(training.optimizer)
        task.after_step()
        training.scheduler.step()
        _log_step(training, record, log)
        bar.update(1, ", ".join(f"{name} {value:.3g}" for name, value in record.losses.items()))


def _log_step(training: Training, record: StepRecord, log: RunLogger) -> None:
    for name, value in record.losses.items():
        sums = training.epoch_sums.setdefault(name, [0.0, 0.0])
        sums[0] += value
        sums[1] += 1
    for event in training.executor.drain_events():
        training.interventions += 1
        log.event(event.step, event.kind, event.reason, **event.details)
    if record.step % LOG_EVERY == 0:
        scalars = {f"loss/{name}": value for name, value in record.losses.items()}
        scalars |= {f"weight/{name}": value for name, value in record.weights.items()}
        scalars |= {f"share/{name}": value for name, value in shares(record.losses, record.weights).items()}
        scalars |= {"gradient_norm": record.gradient_norm, "skipped_steps": training.executor.skipped_steps}
        scalars["interventions"] = training.interventions
        log.scalars(record.step, scalars)


def shares(losses: Mapping[str, float], weights: Mapping[str, float]) -> dict[str, float]:
    """Each term's share of Σⱼ wⱼ|Lⱼ|."""
    mass = {name: weights[name] * abs(value) for name, value in losses.items()}
    whole = sum(mass.values())
    return {name: value / whole if whole > 0 else 0.0 for name, value in mass.items()}


def _end_epoch(training: Training, epoch: int, log: RunLogger) -> None:
    """Measure the select split, tell the executor, and write the epoch's row."""
    task, executor = training.task, training.executor
    select = _measure(task, "select") if task.holds_out else {}
    means = {name: total / count for name, (total, count) in training.epoch_sums.items()}
    executor.end_epoch(**select)
    row: dict[str, float | int | str | None] = {"epoch": epoch, "step": executor.signals.step}
    row |= {f"loss_{name}": means.get(name) for name in task.terms}
    row |= {f"weight_{name}": executor.weights[name] for name in task.terms}
    row |= {f"share_{name}": shares(means, executor.weights).get(name) for name in task.terms}
    row |= {**select, "skipped_steps": executor.skipped_steps, "interventions": training.interventions}
    log.epoch(row)
    log.scalars(executor.signals.step, {f"select/{name}": value for name, value in select.items()})


def _measure(task: Task, split: str) -> dict[str, float]:
    return {f"{split}_{name}": value for name, value in task.evaluate(split).items()}


def _result(config: RunConfig, training: Training, seconds: float) -> dict[str, object]:
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
        "train_seconds": round(seconds, 3),
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


def _save(folder: Path, config: RunConfig, training: Training, result: Mapping[str, object]) -> None:
    """Write the checkpoint, then the result: a folder with a result is a finished run."""
    buffer = io.BytesIO()
    torch.save(training.state_dict() | {"config": to_json(config)}, buffer)
    write_atomic(folder / "checkpoint.pt", buffer.getvalue())
    write_atomic(folder / "result.json", json_dump({**result, "provenance": provenance(sys.argv)}))


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


def _shown(total: int, config: RunConfig, quiet: bool) -> AbstractContextManager[Progress]:
    return nullcontext(_Silent()) if quiet else progress(total, f"{config.mode} seed {config.seed}")


class _Silent:
    """A progress that shows nothing."""

    def update(self, n: int = 1, text: str = "") -> None:
        """Nothing."""
