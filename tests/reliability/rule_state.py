"""A rule's state survives: saved and loaded at any step, its next weights are the same to the last bit.

    python -m tests.reliability.rule_state

Every rule, ours and TorchJD's, at random cuts of a run with epochs, terms that come and go, and rejected steps. The
state goes through a file and ``weights_only=True`` into an executor that was made anew.
"""

from __future__ import annotations

import importlib.util
import io
import math
import random
import warnings
from typing import Any

import torch

from adaptive_loss.weighting import TORCHJD, weightings
from tests.reliability.problems import WEIGHTS, ThreeHeads
from tests.reliability.rows import Row
from tests.test_weighting import executor_for

LENGTH, AFTER = 60, 8


class Run:
    """A model, a rule and an optimizer in training."""

    def __init__(self, rule: str) -> None:
        self.net, self.executor = ThreeHeads(seed=3), executor_for(rule, WEIGHTS)
        self.data = torch.randn(6, 4, generator=torch.Generator().manual_seed(3))
        self.optimizer = torch.optim.Adam([*self.net.parameters(), *self.executor.parameters()], lr=1e-3)

    def step(self, i: int, dice: random.Random) -> dict[str, float]:
        """Step ``i`` of the run; the weights after it."""
        losses, features = self.net(self.data, without=dice.choice(("", "", "", "b", "c")))
        if dice.random() < 0.1:
            losses["a"] = losses["a"] * math.nan
        self.optimizer.zero_grad()
        self.executor(losses, tap=features).backward()
        self.executor.step(self.optimizer)
        if i % 5 == 4:
            self.executor.end_epoch(select_loss=1.0 / (i + 1))
        return self.executor.weights

    def save(self) -> bytes:
        """What a checkpoint of it holds."""
        file = io.BytesIO()
        torch.save([part.state_dict() for part in self._parts()], file)
        return file.getvalue()

    def load(self, saved: bytes) -> None:
        """Continue from :meth:`save`."""
        for part, state in zip(self._parts(), torch.load(io.BytesIO(saved), weights_only=True), strict=True):
            part.load_state_dict(state)

    def _parts(self) -> tuple[Any, ...]:
        return self.net, self.executor, self.optimizer


def differing(rule: str, cuts: list[int]) -> list[int]:
    """The cuts after which some weight is not what it is without the restart."""
    whole, dice, saved, weights = Run(rule), random.Random(rule), {}, []
    for i in range(LENGTH):
        if i in cuts:
            saved[i] = (whole.save(), dice.getstate())
        weights.append(whole.step(i, dice))
    wrong = []
    for cut, (state, dots) in saved.items():
        again, throws = Run(rule), random.Random()
        again.load(state)
        throws.setstate(dots)
        if [again.step(i, throws) for i in range(cut, cut + AFTER)] != weights[cut : cut + AFTER]:
            wrong.append(cut)
    return wrong


def rules() -> list[str]:
    """Ours, and TorchJD's where it is installed; Nash-MTL solves too slowly to be tried this often."""
    theirs = [name for name in TORCHJD if name != "nash_mtl"] if importlib.util.find_spec("torchjd") else []
    return [*weightings.names(), *theirs]


def torture(cuts: int = 20) -> Row:
    """The row of the table."""
    dice, wrong = random.Random(0), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for rule in rules():
            at = sorted(dice.sample(range(LENGTH - AFTER), cuts))
            wrong += [f"{rule} at step {cut}" for cut in differing(rule, at)]
    note = f"{len(rules())} rules, {AFTER} steps after each of {cuts} cuts"
    return Row("rule state survives", len(rules()) * cuts, len(wrong), "; ".join([note, *wrong[:3]]))


if __name__ == "__main__":
    print(torture())
