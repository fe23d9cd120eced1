"""What the executor does around a step, for one row of a fleet: signals, controller, residual, weights; no guards."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from adaptive_loss.gradients import look_ahead
from adaptive_loss.guards import REACH
from adaptive_loss.lookahead import Schedule
from adaptive_loss.losses import Terms
from adaptive_loss.meta.families.base import Family
from adaptive_loss.meta.fleet import Fleet, rate_level
from adaptive_loss.meta_controller import ControllerLaw, MetaController, Outlook, way
from adaptive_loss.rl.nudges import MonitorConfig, Nudges
from adaptive_loss.signals import Signals
from adaptive_loss.weighting.base import Context


class Looked(NamedTuple):
    """A look-ahead's Gramian, [K+1, K+1], and the objective's value."""

    products: Tensor
    objective: float


@dataclass(frozen=True)
class StepSeen:
    """What one row's step showed.

    Args:
        values: [K] its losses.
        norm: length of the gradient that the optimizer saw.
        rate: the learning rate.
        look: its look-ahead, where there was one.
    """

    values: Tensor
    norm: float
    rate: float
    look: Looked | None


class Steering:
    """Signals and weights of one run: w = start · exp(controller + residual), its sum kept where there is no base.

    It differs from the executor in that there are no guards: nothing is rejected, and no weight but the reach's bound
    holds.

    Args:
        start: name → start weight.
        family: says which term is the base, and which are pinned.
        law: the controller's; None for none.
        steps: length of the run.
        config: the residual's steps and bounds.
    """

    def __init__(
        self,
        start: Mapping[str, float],
        family: type[Family] | Family,
        law: ControllerLaw | None,
        steps: int,
        config: MonitorConfig = MonitorConfig(),
    ) -> None:
        self.terms = Terms(dict(start), family.base, pinned=family.pinned)
        self.controller = None if law is None else MetaController(law)
        if self.controller is not None:
            self.controller.bind(self.terms, steps, seed=0)
        self.nudges = Nudges(self.terms, config)
        self.signals = Signals(len(start), steps)
        self.applied = self.terms.start_weights
        self._present = self.terms.active

    def weights(self, residual: Tensor | None = None) -> Tensor:
        """[K] the weights now, or as they would be with another ``residual``, [K] nats."""
        gain = self.nudges.residual if residual is None else residual
        if self.controller is not None:
            gain = gain + self.controller.gains()
        start = self.terms.start_weights
        raw = start * torch.where(self.terms.movable, gain.clamp(-REACH, REACH), 0.0).exp()
        return raw * (start.sum() / raw.sum()) if self.terms.base is None else raw

    def take(self, seen: StepSeen, rescale: Callable[[float], None]) -> Context:
        """Learn from a step that was made under :meth:`weights`; what the controller may look at then."""
        self.applied = self.weights()
        self.signals.update(seen.values, gradient_norm=seen.norm, learning_rate=seen.rate)
        if seen.look is not None:
            found = look_ahead(seen.look.products, self.applied, self.terms.base_index, seen.look.objective)
            self.signals.look(found, self._train(seen.values))
        return self.context(seen.look is not None, rescale)

    def context(self, looked: bool = False, rescale: Callable[[float], None] | None = None) -> Context:
        """What a modulator may look at."""
        return Context(
            step=self.signals.step,
            present=self._present,
            signals=self.signals,
            weights=self.applied,
            start=self.terms.start_weights,
            looked=looked,
            objective=lambda: self.signals.probe,
            rescale=rescale,
        )

    def _train(self, values: Tensor) -> float:
        base = self.terms.base_index
        return float(self.applied @ values if base is None else values[base])

    @property
    def schedule(self) -> Schedule:
        """When it would have look-aheads."""
        return Schedule() if self.controller is None else self.controller.schedule


def advance(fleet: Fleet, weights: Tensor, steered: Mapping[int, Steering], follows: Tensor) -> None:
    """One step of a fleet, and what its steerings make of it.

    Args:
        fleet: whose rows are all trained.
        weights: [rows, K].
        steered: row → its steering; a row without one is trained all the same.
        follows: [rows] for each row the one whose controller speaks to its optimizer's memory.
    """
    losses = fleet.losses()
    looked = next(iter(steered.values())).schedule.due(fleet.done, fleet.steps)
    found = fleet.products(losses) if looked else None
    rates = (fleet.rate * rate_level(fleet.done, fleet.steps)).tolist()
    values = fleet.step(weights, losses)
    norms, ratios = fleet.norms.tolist(), torch.ones(len(fleet))
    contexts = []
    for row, steering in steered.items():
        look = None if found is None else Looked(found[0][row], float(found[1][row]))
        contexts.append(
            steering.take(StepSeen(values[row], norms[row], rates[row], look), partial(ratios.__setitem__, row))
        )
    move_together([steering.controller for steering in steered.values()], contexts)
    fleet.optimizer.rescale(ratios[follows])


def move_together(controllers: Sequence[MetaController | None], contexts: Sequence[Context]) -> None:
    """What each controller does after a step, their moves found in one pass: all have one law and one age."""
    due = [(c, context, c.outlook(context)) for c, context in zip(controllers, contexts, strict=True) if c is not None]
    moving = [(controller, context, outlook) for controller, context, outlook in due if outlook is not None]
    if not moving:
        return
    ways = way(moving[0][0].law, Outlook.stacked([outlook for _, _, outlook in moving]))
    for (controller, context, outlook), own in zip(moving, ways, strict=True):
        controller.move(context, outlook, own)


def steer(fleet: Fleet, law: ControllerLaw) -> None:
    """Train a fleet to its end under a law."""
    starts = [dict(zip(fleet.family.terms, start, strict=True)) for start in fleet.start.tolist()]
    steered = {row: Steering(start, fleet.family, law, fleet.steps) for row, start in enumerate(starts)}
    for _ in range(fleet.steps - fleet.done):
        weights = torch.stack([steering.weights() for steering in steered.values()])
        advance(fleet, weights, steered, torch.arange(len(fleet)))
