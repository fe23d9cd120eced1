"""A training loop as a user would write it, with everything in it that a checkpoint must carry."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from adaptive_loss import Guards, LossMonitor, MetaController, probes
from adaptive_loss.checkpoint import gather, restore
from adaptive_loss.data.base import Batches
from adaptive_loss.loss_monitor import MonitorConfig
from adaptive_loss.meta_controller import RULE
from adaptive_loss.rl.dqn import DQNConfig
from adaptive_loss.utils.logging import RunLogger
from tests.test_weighting import executor_for

WEIGHTS = {"a": 1.0, "b": 0.5, "c": 2.0}
EXAMPLES, BATCH, EPOCHS = 36, 6, 3
PER_EPOCH = EXAMPLES // BATCH
STEPS = EPOCHS * PER_EPOCH
EDGES = tuple(range(PER_EPOCH, STEPS, PER_EPOCH))
SKIPPED = (4, 9, 15)
"""Steps, counted from 1, whose losses are not finite, so that they are skipped."""


@dataclass(frozen=True)
class Setting:
    """Which run: the weighting rule, the seed of everything, and the loader's worker processes."""

    rule: str
    seed: int = 0
    workers: int = 0


class Net(nn.Module):
    """A trunk with dropout, which draws from torch's global generator, and a head for every term."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.2))
        self.heads = nn.ModuleList(nn.Linear(8, 1) for _ in WEIGHTS)

    def forward(self, x: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The terms, which differ in scale and pull apart, and the features they share."""
        features = self.trunk(x)
        losses = [(head(features) - 1.5 * i).square().mean() * 10.0**i for i, head in enumerate(self.heads)]
        return dict(zip(WEIGHTS, losses, strict=True)), features


class Examples(Dataset[Tensor]):
    """What the loader's workers prepare."""

    def __init__(self, seed: int) -> None:
        self.data = torch.randn(EXAMPLES, 4, generator=torch.Generator().manual_seed(seed))

    def __getitem__(self, index: int) -> Tensor:
        return self.data[index] * 2


class SmallRun:
    """Three epochs of six steps under one rule, with controller, monitor, probe, quarantine, scaler and logs."""

    def __init__(self, setting: Setting, folder: Path) -> None:
        random.seed(setting.seed)
        np.random.seed(setting.seed)  # noqa: NPY002 - the global generators are part of what is carried
        torch.manual_seed(setting.seed)
        self.net = Net()
        data = Examples(setting.seed)
        self.batches = Batches(EXAMPLES, BATCH, torch.Generator().manual_seed(setting.seed))
        self.loader = DataLoader(
            data, batch_sampler=self.batches, generator=self.batches.generator, num_workers=setting.workers
        )
        monitor = LossMonitor(1.0, MonitorConfig(every=1, quiet_start=0.0, dqn=DQNConfig(batch_size=4, capacity=6)))
        self.executor = executor_for(
            setting.rule,
            WEIGHTS,
            modulators=(MetaController(RULE), monitor),
            probe=probes.held_out(lambda x: sum(self.net(x)[0].values()), data.data, batch_size=5, model=self.net),
            total_steps=STEPS,
            seed=setting.seed,
            guards=Guards(quarantine=2, quarantine_steps=3, clip_norm=50.0),
        )
        self.optimizer = torch.optim.Adam([*self.net.parameters(), *self.executor.parameters()], lr=0.02)
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, 0.05, total_steps=STEPS)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3)
        self.log = RunLogger(folder, tensorboard=False)
        self.step = 0
        self.skipped_last = False

    def state(self) -> dict[str, Any]:
        """What a checkpoint of this run holds."""
        return gather(self._parts(), step=self.step)

    def go_on(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state`."""
        self.step = restore(state, self._parts())["step"]

    def _parts(self) -> dict[str, Any]:
        names = ("net", "executor", "optimizer", "scheduler", "scaler", "batches", "log")
        return {name: getattr(self, name) for name in names}

    def train(self, between_steps: Callable[[], None] = lambda: None) -> None:
        """Do what is left of the run; ``between_steps`` is called wherever it could be cut."""
        while self.step < STEPS:
            for x in self.batches.through(self.loader):
                self._step(x)
                if self.step % PER_EPOCH:
                    between_steps()
            self._end_epoch()
            between_steps()
        self.log.close()

    def _step(self, x: Tensor) -> None:
        self.step += 1
        self.optimizer.zero_grad()
        jitter = random.random() + float(np.random.rand())  # noqa: NPY002
        losses, features = self.net(x + 0.01 * jitter)
        if self.step in SKIPPED:
            losses = {name: loss * float("nan") for name, loss in losses.items()}
        self.scaler.scale(self.executor(losses, tap=features)).backward()
        self.skipped_last = not self.executor.step(self.optimizer, scaler=self.scaler).applied
        self.scheduler.step()
        self._log_events()

    def _end_epoch(self) -> None:
        self.executor.end_epoch(select_loss=1.0 / self.step)
        self.log.epoch({"step": self.step, **self.executor.weights})
        self._log_events()

    def _log_events(self) -> None:
        for event in self.executor.drain_events():
            self.log.event(event.step, event.kind, event.reason, **event.details)
