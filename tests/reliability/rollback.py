"""A run that goes bad goes back to its snapshot, bit for bit, at most three times before it says what is wrong.

    python -m tests.reliability.rollback

Each trial trains a small model under a rule and an optimizer of its own. Every accepted step's whole state is kept
aside, by its number. First come random faults that pass; each return must find the state that was kept for the step it
returns to. Then comes a fault that stays: three returns, then the diagnosis.
"""

from __future__ import annotations

import copy
import math
import random
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from adaptive_loss import LossExecutor, LossMonitor, MetaController, Rollback
from adaptive_loss.meta_controller import RULE
from adaptive_loss.probes import held_out
from tests.reliability.rows import Row
from tests.test_executor import same

RULES = ("fixed", "uncertainty", "dwa", "relobralo", "famo", "rlw")
RETRIES = 3


class Run:
    """One trial's training, and every accepted step's state."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1))
        self.data = torch.randn(64, 3, generator=torch.Generator().manual_seed(seed))
        self.executor = LossExecutor(
            {"fit": 1.0, "small": 0.3},
            base=self.dice.choice((None, "fit")),
            weighting=self.dice.choice(RULES),
            modulators=self.dice.choice(((), (MetaController(RULE), LossMonitor()))),
            probe=held_out(lambda x: self.losses(x)["fit"], self.data, batch_size=8),
            total_steps=200,
            seed=seed,
        )
        kind = self.dice.choice((torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop))
        self.optimizer = kind([*self.net.parameters(), *self.executor.parameters()], lr=0.01)
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.999)
        self.parts = (self.net, self.scheduler, self.optimizer, self.executor)
        self.every, self.after = self.dice.randint(1, 7), self.dice.randint(1, 9)
        self.rollback = Rollback(
            self.executor,
            self.optimizer,
            self.net,
            self.scheduler,
            every=self.every,
            after=self.after,
            retries=RETRIES,
        )
        self.kept = {0: self.state()}

    def state(self) -> list[Any]:
        """A copy of everything that a snapshot holds."""
        return copy.deepcopy([dict(part.state_dict()) for part in self.parts])

    def losses(self, x: Tensor) -> dict[str, Tensor]:
        out = self.net(x)
        return {"fit": (out - x.sum(1, keepdim=True)).square().mean() + 0.1, "small": out.abs().mean() + 0.1}

    def step(self, fault: str | None) -> bool:
        """One step, with a fault or without; whether it went back."""
        losses = self.losses(self.data[self.dice.sample(range(64), 8)])
        if fault == "nan":
            losses["small"] = losses["small"] * math.nan
        self.optimizer.zero_grad()
        self.executor(losses).backward()
        if fault == "gradient":
            next(self.net.parameters()).grad.mul_(math.nan)  # type: ignore[union-attr]
        record = self.executor.step(self.optimizer)
        if fault is None and record.applied:
            self.scheduler.step()
            self.kept[record.step] = self.state()
        return self.rollback.watch(record)

    def is_back(self) -> bool:
        """Whether all is as it was kept at the step that it has gone back to."""
        return same(self.kept[self.executor.signals.step], self.state())


def trial(seed: int) -> list[str]:
    """What went wrong in one trial."""
    run, wrong = Run(seed), []
    for i in range(6):
        # Every second fault comes before another snapshot, so that one is gone back to twice.
        low, high = (1, run.every) if i % 2 else (run.every + 2, 2 * run.every + 9)
        for _ in range(run.dice.randint(low, high)):
            run.step(None)
        before, fault = run.executor.signals.step, run.dice.choice(("nan", "gradient"))
        returns = [run.step(fault) for _ in range(run.after)]
        lost = before - run.executor.signals.step
        if returns != [False] * (run.after - 1) + [True] or not run.is_back() or lost > run.every:
            wrong.append(f"seed {seed}: {fault} at step {before}: {returns}, bit-equal {run.is_back()}, {lost} lost")
    return wrong + until_it_gives_up(run, seed)


def until_it_gives_up(run: Run, seed: int) -> list[str]:
    """What goes wrong where a fault stays."""
    for _ in range(run.every + 2):
        run.step(None)
    returned = 0
    try:
        for _ in range((RETRIES + 2) * run.after):
            returned += run.step("nan")
    except RuntimeError as error:
        told = all(
            words in str(error) for words in ("term 'small'", "the loss is nan at step", "last good values: fit ")
        )
        good = told and returned == RETRIES and run.is_back()
        return [] if good else [f"seed {seed}: {returned} returns, bit-equal {run.is_back()}: {error}"]
    return [f"seed {seed}: it never gave up"]


def torture(trials: int = 100) -> Row:
    """The row of the table."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrong = [what for seed in range(trials) for what in trial(seed)]
    note = f"10 returns each, {RETRIES} retries before the diagnosis"
    return Row("rollback", trials, len(wrong), "; ".join([note, *wrong[:3]]))


if __name__ == "__main__":
    print(torture())
