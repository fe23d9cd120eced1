"""Everything of one run that moves, and how it is built from the run's configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from adaptive_loss.checkpoint import Stateful, gather, restore
from adaptive_loss.data.base import Batches, Dataset
from adaptive_loss.data.points import PointDataset
from adaptive_loss.errors import UsageError
from adaptive_loss.guards import Guards
from adaptive_loss.loss_executor import LossExecutor, StepRecord
from adaptive_loss.losses import LossTerms
from adaptive_loss.modes import modes
from adaptive_loss.modes.base import Mode
from adaptive_loss.seeding import own_generator, seed_global
from adaptive_loss.tasks import tasks
from adaptive_loss.tasks.base import Task
from adaptive_loss.utils.config import RunConfig, held_targets, resolve_device, start_weights, to_json
from adaptive_loss.utils.logging import RunLogger
from adaptive_loss.utils.performance import Timer


@dataclass(frozen=True)
class Learner:
    """One network under its executor and its optimizer."""

    network: nn.Module
    executor: LossExecutor
    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler

    def learn(self, losses: LossTerms, tap: Tensor | Sequence[Tensor] | None = None) -> StepRecord:
        """One optimizer step on one batch's losses, applied or skipped."""
        # Another network's backward may have left gradients here, as a generator's leaves in its discriminator.
        self.optimizer.zero_grad()
        self.executor(losses, tap=tap).backward()
        record = self.executor.step(self.optimizer)
        self.scheduler.step()
        return record

    def parts(self) -> dict[str, Stateful]:
        """What a checkpoint holds of it, by name."""
        parts = {"model": self.network, "executor": self.executor, "optimizer": self.optimizer}
        return {**parts, "scheduler": self.scheduler}


@dataclass
class Training:
    """Everything of one run that moves.

    Args:
        learner: of the task's model.
        opponents: name → what is trained beside it, in the order of their steps.
        wall, timer: seconds of the whole run, and of its training steps alone.
        step: optimizer steps tried, applied or skipped.
        interventions: events so far.
        epoch_sums: term → sum and number of its losses in this epoch.
    """

    task: Task
    learner: Learner
    opponents: Mapping[str, Learner]
    batches: Batches
    autocast: AbstractContextManager[Any]
    wall: Timer = field(default_factory=Timer)
    timer: Timer = field(default_factory=Timer)
    step: int = 0
    interventions: int = 0
    epoch_sums: dict[str, list[float]] = field(default_factory=dict)

    @property
    def executor(self) -> LossExecutor:
        """Of the task's model."""
        return self.learner.executor

    @property
    def learners(self) -> list[Learner]:
        """The model's, then the opponents'."""
        return [self.learner, *self.opponents.values()]

    @property
    def weights(self) -> dict[str, float]:
        """The weights applied last, of all terms."""
        return {name: weight for learner in self.learners for name, weight in learner.executor.weights.items()}

    def shares(self, losses: Mapping[str, float]) -> dict[str, float]:
        """Each term's share of Σⱼ wⱼ|Lⱼ| over the terms of its own network."""
        executors = [learner.executor for learner in self.learners]
        own = [({name: losses[name] for name in ex.terms.names if name in losses}, ex.weights) for ex in executors]
        return {name: share for part, weights in own for name, share in shares(part, weights).items()}

    @property
    def skipped_steps(self) -> int:
        """Steps of any network that were not taken."""
        return sum(learner.executor.skipped_steps for learner in self.learners)

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
        theirs = {
            f"{name}.{part}": value
            for name, learner in self.opponents.items()
            for part, value in learner.parts().items()
        }
        return {**self.learner.parts(), **theirs, "task": self.task, "batches": self.batches, "log": log}


def prepare(config: RunConfig, data: Dataset | PointDataset) -> Training:
    """Build a run; every part draws from a generator of its own, so switching one on changes no other."""
    device = torch.device(resolve_device(config.device))
    mode: Mode = modes.get(config.mode)()
    kind: type[Task] = tasks.get(config.task)
    weights, targets = _start(config, kind, mode)
    seed_global(config.seed)
    wanted = [name for name, weight in weights.items() if weight > 0]
    held = data.held_in if mode.all_data else None
    task = kind(config, data, device, wanted=wanted, train=held)
    batches = Batches(len(data.train if held is None else held), config.batch_size, own_generator(config.seed, "order"))
    total = config.epochs * len(batches)
    modulators, rule = mode.modulators(config.policy), config.weighting
    if mode.by_bucket and kind.bucket_rule is not None:
        modulators, rule = (), kind.bucket_rule if rule == "fixed" else rule
    guards = Guards(spikes=kind.steady)
    executor = LossExecutor(
        {name: weights[name] for name in kind.terms},
        base=kind.base,
        targets=targets,
        pinned=[name for name in kind.pinned if name not in targets],
        weighting=task.weighting("fixed" if mode.base_only else rule),  # a rule has nothing to weigh on the base alone
        modulators=modulators,
        probe=task.probe if modulators else None,
        guards=guards,
        total_steps=total,
        seed=config.seed,
    )
    opponents = {
        opponent.name: _learner(
            task,
            task.opponent(opponent.name),
            LossExecutor(
                {name: weights[name] for name in opponent.terms},
                base=opponent.terms[0],
                guards=guards,
                total_steps=total,
            ),
            total,
        )
        for opponent in kind.opponents
    }
    learner = _learner(task, task.model, executor, total)
    return Training(task, learner, opponents, batches, _autocast(kind, config.precision, device))


def _start(config: RunConfig, kind: type[Task], mode: Mode) -> tuple[dict[str, float], dict[str, float]]:
    """The start weight of every term, and the target of every term that is held at one."""
    weights = start_weights(config, kind.all_terms())
    for base in kind.bases():
        if weights[base] == 0:
            raise UsageError(f"--weights {base}=0: {base} is a base term; give it a weight above 0")
    targets = held_targets(config, {name: weights[name] for name in kind.terms}, kind.base)
    if mode.adapts:
        targets = {name: value for name, value in kind.targets.items() if weights[name] > 0} | targets
    if not mode.base_only:
        return weights, targets
    if kind.base is None:
        raise UsageError(f"mode {config.mode}: task {config.task} has no base term; choose another mode")
    return weights | {name: 0.0 for name in kind.terms if name != kind.base}, {}


def _learner(task: Task, network: nn.Module, executor: LossExecutor, steps: int) -> Learner:
    optimizer = task.optimizer([*network.parameters(), *executor.parameters()])
    return Learner(network, executor, optimizer, task.scheduler(optimizer, steps))


def shares(losses: Mapping[str, float], weights: Mapping[str, float]) -> dict[str, float]:
    """Each term's share of Σⱼ wⱼ|Lⱼ|."""
    mass = {name: weights[name] * abs(value) for name, value in losses.items()}
    whole = sum(mass.values())
    return {name: value / whole if whole > 0 else 0.0 for name, value in mass.items()}


def _autocast(kind: type[Task], precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """bf16 autocast where it was asked for, or by itself where the processor computes in bf16 and the task bears it."""
    wanted = precision == "bf16" or (precision == "auto" and "bf16" in kind.precisions and has_bf16(device))
    return torch.autocast(device.type, torch.bfloat16) if wanted else nullcontext()


def has_bf16(device: torch.device) -> bool:
    """Whether the processor has bf16 arithmetic, not merely a slow emulation of it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
