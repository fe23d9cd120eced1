"""Loss Monitor Agent: a Deep Q-Network that watches training dynamics and nudges weights within bounds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adaptive_loss import signals as signal
from adaptive_loss.cards import read_card
from adaptive_loss.events import Event
from adaptive_loss.losses import Terms
from adaptive_loss.modulator import Modulator
from adaptive_loss.parallel import first_decides
from adaptive_loss.rl.dqn import DQN
from adaptive_loss.rl.nudges import KEEP, N_GLOBAL, N_TERM, MonitorConfig, Nudges, new_network
from adaptive_loss.seeding import own_generator
from adaptive_loss.signals import log_ratio
from adaptive_loss.weighting.base import Context

POLICIES = Path(__file__).parent / "policies"


class LossMonitor(Modulator):
    """A bounded residual on the log-weights, chosen by a Deep Q-Network: gain ρ·u with |uᵢ| ≤ log 4.

    Every few steps it reads the signals and picks one action: keep, reset all residuals, or nudge one term's up or
    down. The reward is −Δ log of the held-out objective minus its running mean, in units of its running spread: never
    a training loss, and independent of the weights' scale. The objective comes from the executor's probe; without one,
    from the ``select_loss`` given to ``end_epoch``; without either it keeps. Untrained, its values start from the sign
    of steady look-aheads; it learns during the run. Of several ranks the first one decides for all.

    Args:
        rho: ρ in [0, 1]; 0 learns and logs, and changes nothing.
        config: settings.

    Raises:
        ValueError: ρ outside [0, 1].

    Example:
        >>> from adaptive_loss import LossExecutor, LossMonitor
        >>> executor = LossExecutor({"ce": 1.0, "mix": 1.0}, base="ce", modulators=[LossMonitor()],
        ...                         probe=lambda: torch.ones((), requires_grad=True))
        >>> executor.modulators[0].nudges.n_actions
        4
    """

    def __init__(self, rho: float = 1.0, config: MonitorConfig = MonitorConfig()) -> None:
        if not 0 <= rho <= 1:
            raise ValueError(f"the monitor's rho is {rho}: give a number in [0, 1]")
        self.rho, self.config = rho, config

    @classmethod
    def from_policy(cls, folder: str | Path | None) -> LossMonitor:
        """The monitor with the ρ that the evidence on a policy's card allows; None is the package's own."""
        file = Path(folder or POLICIES) / "monitor.json"
        return read_card(file, "the monitor's card", lambda card: cls(float(card["rho"])), signal.VERSION)

    def bind(self, terms: Terms, total_steps: int | None, seed: int) -> None:
        """Allocate the agent for the terms that may move."""
        super().bind(terms, total_steps, seed)
        self.nudges = Nudges(terms, self.config)
        self.next_decision = 0
        self.objective: float | None = None
        self.before: tuple[Tensor, int] | None = None
        self.rewards = 0
        self.reward_mean = self.reward_square = 0.0
        gamma = 0.99 if total_steps is None else 1.0
        self.agent = DQN(
            lambda: new_network(self.config),
            N_GLOBAL + N_TERM * max(len(self.nudges.moving), 1),
            max(self.nudges.n_actions, 4),
            replace(self.config.dqn, gamma=gamma),
            seed=own_generator(seed, "monitor").initial_seed(),
            default_action=KEEP,
        )

    def gains(self) -> Tensor:
        """[K] ρ·u."""
        return self.rho * self.nudges.residual

    def after_step(self, context: Context) -> list[Event]:
        """Decide, where it is time and there is a probe."""
        if context.objective is None or context.step < self.next_decision or not self.nudges.moving or self._has_ended:
            return []
        length = context.step if self.total_steps is None else self.total_steps
        self.next_decision = context.step + max(self.config.every, length // self.config.decisions)
        return self._decide(context, context.objective())

    def end_epoch(self, context: Context, metrics: Mapping[str, float]) -> list[Event]:
        """Without a probe, decide on the select split's loss where it is given."""
        if context.objective is None and "select_loss" in metrics and self.nudges.moving:
            return self._decide(context, float(metrics["select_loss"]))
        return []

    @property
    def _has_ended(self) -> bool:
        """Whether the last transition is stored; from then on it would only keep, and learn nothing from it."""
        return self.objective is not None and self.before is None

    def _decide(self, context: Context, objective: float) -> list[Event]:
        if not math.isfinite(objective):
            return []
        observation, mask = self.nudges.observation(context, self.rho), self.nudges.mask(context)
        over = context.signals.progress is not None and context.signals.progress > 1 - self.config.quiet_end
        self._learn(observation, mask, objective, over)
        action = first_decides(self._choose(observation, mask), context.group)
        self.objective, self.before = objective, None if over else (observation, action)
        self.nudges.rest()
        before = self.nudges.residual
        what = self.nudges.apply(action)
        return [] if what is None else [self._event(context, what, before)]

    def _choose(self, observation: Tensor, mask: Tensor) -> int:
        return self.agent.act(observation, mask)

    def _learn(self, observation: Tensor, mask: Tensor, objective: float, over: bool) -> None:
        """Store the transition that ends here and learn from the replay."""
        if self.before is None or self.objective is None:
            return
        reward = self._reward(log_ratio(self.objective, objective))
        last, action = self.before
        self.agent.observe(last, action, reward, observation, mask, terminated=over, truncated=False)
        for _ in range(self.config.updates):
            self.agent.learn()

    def _reward(self, gain: float) -> float:
        """The gain in log-objective above its running mean, in units of its running spread, clipped to ±3."""
        self.rewards += 1
        rate = max(0.05, 1 / self.rewards)
        centred = gain - self.reward_mean
        self.reward_mean += rate * centred
        self.reward_square += rate * (centred**2 - self.reward_square)
        return max(-3.0, min(3.0, centred / math.sqrt(self.reward_square))) if self.reward_square > 0 else 0.0

    def _event(self, context: Context, what: str, before: Tensor) -> Event:
        details = {
            "before": dict(zip(self.terms.names, before.tolist(), strict=True)),
            "after": dict(zip(self.terms.names, self.nudges.residual.tolist(), strict=True)),
            "rho": self.rho,
        }
        return Event(context.step, "action", what, details)

    def statistics(self) -> dict[str, float]:
        """What shows that it learns: transitions stored, updates, target syncs, the running loss, epsilon."""
        loss = self.agent.loss_ema
        return {
            "transitions": float(self.agent.transitions),
            "updates": float(self.agent.updates),
            "target_syncs": float(self.agent.syncs),
            "loss": math.nan if loss is None else loss,
            "epsilon": self.agent.epsilon,
        }

    def state_dict(self) -> dict[str, Any]:
        """Residual, agent with replay and generators, and the transition under way."""
        return {
            **super().state_dict(),
            **self.nudges.state_dict(),
            "next_decision": self.next_decision,
            "objective": self.objective,
            "before": None if self.before is None else [self.before[0].clone(), self.before[1]],
            "rewards": [self.rewards, self.reward_mean, self.reward_square],
            "agent": self.agent.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        super().load_state_dict(state)
        self.nudges.load_state_dict(state)
        self.next_decision, self.objective = state["next_decision"], state["objective"]
        self.before = None if state["before"] is None else (state["before"][0].clone(), state["before"][1])
        self.rewards, self.reward_mean, self.reward_square = state["rewards"]
        self.agent.load_state_dict(state["agent"])


class RandomMonitor(LossMonitor):
    """The control: the same actions, masks and timing, chosen at random with equal chances."""

    def bind(self, terms: Terms, total_steps: int | None, seed: int) -> None:
        """Allocate as the monitor does, and a generator for the choices."""
        super().bind(terms, total_steps, seed)
        self.dice = own_generator(seed, "random monitor")

    def _choose(self, observation: Tensor, mask: Tensor) -> int:
        allowed = mask.nonzero().flatten()
        return int(allowed[torch.randint(len(allowed), (), generator=self.dice)])

    def _learn(self, observation: Tensor, mask: Tensor, objective: float, over: bool) -> None:
        """It does not."""

    def state_dict(self) -> dict[str, Any]:
        """The monitor's state and the dice's."""
        return super().state_dict() | {"dice": self.dice.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        super().load_state_dict(state)
        self.dice.set_state(state["dice"])
