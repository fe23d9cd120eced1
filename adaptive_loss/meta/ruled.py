"""A weighting rule of the field on small runs: what the executor does with one, for every row of a fleet, unguarded."""

from __future__ import annotations

import torch
from torch import Tensor

from adaptive_loss.losses import Terms
from adaptive_loss.meta.fleet import Fleet
from adaptive_loss.signals import Signals
from adaptive_loss.weighting import weightings
from adaptive_loss.weighting.base import Context

EPOCHS = 15
"""Epochs that a run counts as, for rules that wait for their ends."""


class RuledRun:
    """The weights startᵢ·ruleᵢ of one run; what the rule learns, Adam learns at the run's rate, before that falls.

    Args:
        name: of a rule that sees loss values and no gradients.
        terms: the run's.
        steps: its length.
        rate: its learning rate, as it is until the last steps.
    """

    def __init__(self, name: str, terms: Terms, steps: int, rate: float) -> None:
        self.terms, self.steps, self.done = terms, steps, 0
        self.rule = weightings.get(name)(len(terms.names))
        self.rule.bind(terms, seed=0)
        self.signals = Signals(len(terms.names), steps)
        learned = list(self.rule.parameters())
        self.optimizer = torch.optim.Adam(learned, lr=rate) if learned else None

    def weights(self, values: Tensor) -> Tensor:
        """[K] the weights of this step, whose losses are ``values``, [K]; the rule learns from it."""
        start = self.terms.start_weights
        context = Context(self.done, self.terms.active, self.signals, start, start)
        scaled = values * start
        given = self.rule(scaled, context)
        if self.optimizer is not None:
            penalty = self.rule.penalty(context)
            total = given.double() @ scaled + (0.0 if penalty is None else penalty)
            self.optimizer.zero_grad()
            total.backward()
            self.optimizer.step()
        self.rule.after_step(scaled, context)
        self.done += 1
        if self.done % (self.steps // EPOCHS) == 0:
            self.rule.end_epoch({})
        return given.detach().double() * start


def finish_ruled(fleet: Fleet, name: str) -> None:
    """Train a fleet to its end under a rule."""
    family = fleet.family
    runs = [
        RuledRun(name, Terms(dict(zip(family.terms, start, strict=True)), family.base), fleet.steps, rate)
        for start, rate in zip(fleet.start.tolist(), fleet.rate.tolist(), strict=True)
    ]
    while fleet.done < fleet.steps:
        losses = fleet.losses()
        weights = [run.weights(values) for run, values in zip(runs, losses.detach().double(), strict=True)]
        fleet.step(torch.stack(weights), losses)
