"""Nudges: what the monitor may do to the residual, when, and what it sees; of a run and of an environment alike."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adaptive_loss import signals as signal
from adaptive_loss.losses import Terms
from adaptive_loss.rl.dqn import DQNConfig
from adaptive_loss.rl.networks import EquivariantQ
from adaptive_loss.weighting.base import Context

KEEP, RESET = 0, 1
"""The two actions that name no term; 2 + 2m raises and 3 + 2m lowers the m-th term that may move."""

N_GLOBAL, N_TERM = len(signal.GLOBAL_FEATURES), len(signal.TERM_FEATURES)
_TRUST = signal.TERM_FEATURES.index("trust")


@dataclass(frozen=True)
class MonitorConfig:
    """How the monitor acts and learns.

    Args:
        step: size of one nudge, in nats (log 1.25).
        bound: greatest residual, in nats (log 4).
        every: least number of steps between decisions.
        decisions: about how many decisions a run of known length has, so that their cost vanishes on long runs.
        cooldown: decisions for which a term rests after a nudge.
        quiet_start, quiet_end: shares of a run of known length in which it only keeps.
        doubt: a term whose look-aheads have a t statistic below −doubt is never raised, by a reset neither.
        prior_edge: trust beyond which the untrained agent follows the look-ahead.
        updates: learning updates a decision.
        dqn: the learner's settings.
    """

    step: float = math.log(1.25)
    bound: float = math.log(4.0)
    every: int = 10
    decisions: int = 100
    cooldown: int = 2
    quiet_start: float = 0.05
    quiet_end: float = 0.15
    doubt: float = 2.0
    prior_edge: float = 0.5
    updates: int = 4
    dqn: DQNConfig = DQNConfig(n_step=3, batch_size=16, capacity=1000, learning_starts=8)

    def interval(self, length: int) -> int:
        """Steps from one decision to the next in a run of this length.

        Example:
            >>> MonitorConfig().interval(150), MonitorConfig().interval(10_000)
            (10, 100)
        """
        return max(self.every, length // self.decisions)


class Nudges:
    """The residual u of K terms, M of which may move, and the 2 + 2M actions on it.

    An action leaves u, sets it to 0, or moves one uᵢ by ±``step`` nats within ±``bound``; a term that was moved rests
    for ``cooldown`` decisions. A decision reads :meth:`observation` and :meth:`mask`, ticks :meth:`rest`, and then
    does its action by :meth:`apply`.

    Args:
        terms: the K terms; without a base all of them may move.
        config: sizes of steps, bounds and rests.

    Attributes:
        moving: [M] places of the terms that may move.
        n_actions: 2 + 2M.
        residual: [K] float64, u in nats, 0 for a term that may not move.
        resting: [K] decisions for which each term still rests.

    Example:
        >>> from adaptive_loss.losses import Terms
        >>> nudges = Nudges(Terms({"fit": 1.0, "size": 1.0}, base="fit"), MonitorConfig())
        >>> nudges.n_actions, nudges.moving
        (4, [1])
    """

    def __init__(self, terms: Terms, config: MonitorConfig) -> None:
        self.terms, self.config = terms, config
        self.moving: list[int] = terms.movable.nonzero().flatten().tolist()
        self.n_actions = 2 + 2 * len(self.moving)
        self.residual = torch.zeros(len(terms.names), dtype=torch.float64)
        self.resting = [0] * len(terms.names)

    def observation(self, context: Context, rho: float) -> Tensor:
        """[11 + 9M] float32: the global features, then those of the M terms that may move.

        Args:
            context: of the step that was accepted last.
            rho: how much of the residual is in ``context.weights``; the set-point is what they are without it, up to
                their sum where there is no base.
        """
        set_point = torch.from_numpy(context.weights.numpy() * np.exp(-rho * self.residual.numpy()))
        terms = context.signals.term_features(context.weights, set_point, context.start).numpy()[self.moving]
        whole = np.concatenate((context.signals.global_features().numpy(), terms.ravel()))
        return torch.from_numpy(whole.astype(np.float32))

    def mask(self, context: Context) -> Tensor:
        """[2 + 2M] bool: what is allowed now; keep always is."""
        progress, config = context.signals.progress, self.config
        if progress is not None and not config.quiet_start <= progress <= 1 - config.quiet_end:
            return torch.arange(self.n_actions) == KEEP
        # Lists, for a decision's cost: reading single entries of tensors is what took longest.
        on, residual = context.on.tolist(), self.residual.tolist()
        doubted = (context.signals.t_statistic.numpy() < -config.doubt).tolist()
        lifts_doubted = any(doubt and u < 0 for doubt, u in zip(doubted, residual, strict=True))
        allowed = [True, any(residual) and not lifts_doubted]
        room = config.bound + 1e-9 - config.step
        for i in self.moving:
            ready = on[i] and self.resting[i] == 0
            allowed += [ready and residual[i] <= room and not doubted[i], ready and residual[i] >= -room]
        return torch.from_numpy(np.array(allowed))

    def rest(self) -> None:
        """Let a decision pass for the terms that rest."""
        self.resting = [max(0, rest - 1) for rest in self.resting]

    def apply(self, action: int) -> str | None:
        """Do an action that :meth:`mask` allows, and say what was done: ``"raise 'kl'"``; None for keep."""
        if action == KEEP:
            return None
        if action == RESET:
            self.residual = torch.zeros_like(self.residual)
            return "reset"
        place, down = divmod(action - 2, 2)
        i = self.moving[place]
        self.residual = self.residual.clone()
        self.residual[i] += -self.config.step if down else self.config.step
        self.resting[i] = self.config.cooldown
        return f"{'lower' if down else 'raise'} {self.terms.names[i]!r}"

    def state_dict(self) -> dict[str, Any]:
        """Residual and rests."""
        return {"residual": self.residual.clone(), "resting": list(self.resting)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`; other entries are left alone."""
        self.residual, self.resting = state["residual"].clone(), list(state["resting"])


def new_network(config: MonitorConfig) -> EquivariantQ:
    """A network of the monitor's build: [..., 11 + 9M] to [..., 2 + 2M] for any M, the look-ahead's prior added."""
    edge = config.prior_edge
    prior = None if edge >= 1 else lambda rows: look_ahead_prior(rows, edge)  # no trust lies beyond 1
    return EquivariantQ(N_GLOBAL, N_TERM, prior=prior)


def look_ahead_prior(observations: Tensor, edge: float) -> Tensor:
    """Q₀: raising term i is worth tᵢ beyond ±edge and 0 within, lowering the opposite, keep and reset nothing.

    Args:
        observations: [B, 11 + 9M].
        edge: how steady look-aheads must be to count.

    Returns:
        [B, 2 + 2M].
    """
    trust = observations[:, N_GLOBAL:].unflatten(1, (-1, N_TERM))[..., _TRUST]
    worth = trust.sign() * (trust.abs() - edge).clamp_min(0)
    moves = torch.stack([worth, -worth], dim=-1).flatten(1)
    return torch.cat([torch.zeros_like(moves[:, :2]), moves], dim=1)
