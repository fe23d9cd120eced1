"""Episodes of weighing losses: one training run each, N of them at once, with forks that say what a nudge was worth."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from adaptive_loss.meta.families.base import Family
from adaptive_loss.meta.fleet import STEPS, Fleet
from adaptive_loss.meta.steering import Steering, advance
from adaptive_loss.meta_controller import CLIMB, ControllerLaw
from adaptive_loss.rl.nudges import MonitorConfig

CLIP = 1.0
"""Greatest reward either way, in nats of the objective: no single run decides."""


class Episodes:
    """N training runs of one family whose weights are nudged, each beside two others that are not.

    Row n is the run that is nudged; row N + n forks from it before every action, keeps, and is trained on the same
    batches until the next; row 2N + n is a run of its own that is never nudged. An action's reward is
    r = log L_keep − log L_action, of the objective on one draw of held-out data; at the end of the run
    log J_never − log J_nudged of the judged losses is added. Both are clipped to ±1, and neither changes with the
    scale of the weights. Without forks, for comparison, it is the fall of log L since the last action, less its mean
    over the N runs, and nothing is added.

    Attributes:
        steered: the N nudged runs' steerings.

    Args:
        family: a draw of what the runs share.
        seeds: one a run.
        law: the controller's, whose weights are nudged; None for start weights held.
        config: when to decide, and what a nudge is.
        steps: length of the runs.
        forked: whether actions are paid by forks.

    Example:
        >>> from adaptive_loss.meta.fleet import draw_family
        >>> episodes = Episodes(draw_family("multitask", 0), seeds=[1, 2], steps=40)
        >>> rewards = episodes.act([0, 2])  # one keeps, the other raises its first auxiliary
        >>> rewards[0].item(), episodes.is_over
        (0.0, False)
    """

    def __init__(
        self,
        family: Family,
        seeds: Sequence[int],
        law: ControllerLaw | None = CLIMB,
        config: MonitorConfig = MonitorConfig(),
        steps: int = STEPS,
        forked: bool = True,
    ) -> None:
        self.n, self.config, self.forked = len(seeds), config, forked
        self.fleet = Fleet(family, seeds, steps, copies=3)
        self._nudged = torch.arange(self.n)
        self._never = self._nudged + 2 * self.n
        rows = [*self._nudged.tolist(), *self._never.tolist()]
        self._watched = {row: self._steering(family, row, law, steps) for row in rows}
        self.steered = [self._watched[row] for row in rows[: self.n]]
        self._kept = [steering.nudges.residual for steering in self.steered]
        self.every = config.interval(steps)
        self._follows = torch.cat([self._nudged, self._nudged, self._never])
        self._train(self.every)

    def _steering(self, family: Family, row: int, law: ControllerLaw | None, steps: int) -> Steering:
        start = dict(zip(family.terms, self.fleet.start[row].tolist(), strict=True))
        return Steering(start, family, law, steps, self.config)

    @property
    def is_over(self) -> bool:
        """Whether the runs have ended."""
        return self.fleet.done >= self.fleet.steps

    def observations(self) -> Tensor:
        """[N, 11 + 9M]."""
        return torch.stack([s.nudges.observation(s.context(), 1.0) for s in self.steered])

    def masks(self) -> Tensor:
        """[N, 2 + 2M] bool, the actions that are allowed."""
        return torch.stack([s.nudges.mask(s.context()) for s in self.steered])

    def act(self, actions: Sequence[int]) -> Tensor:
        """Do one allowed action a run and train on until the next decision; the rewards, [N]."""
        before = None if self.forked else self._objective()[: self.n]
        self.fleet.copy(self._nudged, self._nudged + self.n)
        self._kept = [steering.nudges.residual for steering in self.steered]
        for steering, action in zip(self.steered, actions, strict=True):
            steering.nudges.rest()
            steering.nudges.apply(int(action))
        self._train(min(self.every, self.fleet.steps - self.fleet.done))
        found = self._objective()
        if before is not None:
            fall = _gain(before, found[: self.n])
            return fall - fall.mean()
        rewards = _gain(found[self.n : 2 * self.n], found[: self.n])
        return rewards + self.last_gain() if self.is_over else rewards

    def last_gain(self) -> Tensor:
        """[N] log J_never − log J_nudged of the judged losses as they are now, clipped to ±1."""
        return gained(self.finals())

    def finals(self) -> Tensor:
        """[2, N] log J of the nudged runs and of those never nudged."""
        return self.fleet.log_judged().view(3, self.n)[[0, 2]]

    @torch.no_grad()
    def _objective(self) -> Tensor:
        """[3N] on one draw of held-out data."""
        return self.fleet.objective().double()

    def _weights(self) -> Tensor:
        """[3N, K]; a fork follows its run's controller, so that all it lacks is the nudge."""
        kept = [run.weights(residual) for run, residual in zip(self.steered, self._kept, strict=True)]
        nudged, never = (
            [self._watched[row].weights() for row in rows.tolist()] for rows in (self._nudged, self._never)
        )
        return torch.stack([*nudged, *kept, *never])

    def _train(self, steps: int) -> None:
        for _ in range(steps):
            advance(self.fleet, self._weights(), self._watched, self._follows)


def gained(finals: Tensor) -> Tensor:
    """[N] log J_never − log J_nudged, clipped to ±1, of [2, N] log J of the nudged runs and of those never nudged.

    Example:
        >>> gained(torch.tensor([[1.0, 5.0], [1.5, 0.0]])).tolist()
        [0.5, -1.0]
    """
    nudged, never = finals
    return (never - nudged).clamp(-CLIP, CLIP)


def _gain(worse: Tensor, better: Tensor) -> Tensor:
    """log worse − log better, clipped to ±1; a loss that is not finite counts as endless."""
    logs = [value.nan_to_num(math.inf).clamp(1e-30, 1e30).log() for value in (worse, better)]
    return (logs[0] - logs[1]).clamp(-CLIP, CLIP)
