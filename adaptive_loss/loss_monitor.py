"""Loss Monitor Agent: a Deep Q-Network that watches training dynamics and nudges weights within bounds."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adaptive_loss.events import Event
from adaptive_loss.losses import Terms
from adaptive_loss.modulator import Modulator
from adaptive_loss.parallel import first_decides
from adaptive_loss.policy_files import POLICIES, check_like, read_policy, refusing
from adaptive_loss.rl.dqn import DQN
from adaptive_loss.rl.forecast_gate import ForecastGate
from adaptive_loss.rl.networks import equivariant_values, in_numpy, stack
from adaptive_loss.rl.nudges import KEEP, N_GLOBAL, N_TERM, MonitorConfig, Nudges, new_network
from adaptive_loss.seeding import own_generator
from adaptive_loss.signals import log_ratio
from adaptive_loss.weighting.base import Context

_MOST_NETWORKS = 64


class LossMonitor(Modulator):
    """A bounded residual on the log-weights, chosen by a Deep Q-Network: gain ρ·u with |uᵢ| ≤ log 4.

    Every few steps it reads the signals and picks one action: keep, reset all residuals, or nudge one term's up or
    down. The reward is −Δ log of the held-out objective minus its running mean, in units of its running spread: never
    a training loss, and independent of the weights' scale. The objective comes from the executor's probe; without one,
    from the ``select_loss`` given to ``end_epoch``; without either it keeps. Untrained, its values start from the sign
    of steady look-aheads; it learns during the run. Of several ranks the first one decides for all.

    With trained networks it does not learn, draws nothing and reads no objective: it leaves keep only for an action
    whose mean − std over the networks of Q(action) − Q(keep) is above 0. ``online`` has it learn on from them, and
    explore as an untrained one does: never in the quiet first and last part of a run of known length.

    The ``select_loss`` of every ``end_epoch``, or 1 − ``select_accuracy`` where only that is given, feeds a gate: where
    held-out losses turn out worse than their trend while ρ·u ≠ 0, it lowers ρ to 0 for the rest of the run
    (:class:`~adaptive_loss.rl.forecast_gate.ForecastGate`).

    Args:
        rho: ρ in [0, 1], as long as the gate is open; 0 learns and logs, and changes nothing.
        config: settings.
        network: the parameters of E trained networks, each [E, ...], as a policy holds them; None starts untrained.
        online: learn on from ``network``.

    Raises:
        ValueError: ρ outside [0, 1], or parameters of other networks than the monitor's.

    Example:
        >>> from adaptive_loss import LossExecutor, LossMonitor
        >>> executor = LossExecutor({"ce": 1.0, "mix": 1.0}, base="ce", modulators=[LossMonitor()],
        ...                         probe=lambda: torch.ones((), requires_grad=True))
        >>> executor.modulators[0].nudges.n_actions
        4
    """

    def __init__(
        self,
        rho: float = 1.0,
        config: MonitorConfig = MonitorConfig(),
        *,
        network: Mapping[str, Tensor] | None = None,
        online: bool = False,
    ) -> None:
        if not 0 <= rho <= 1:
            raise ValueError(f"the monitor's rho is {rho}: give a number in [0, 1]")
        if network is not None:
            # Trained networks know what a look-ahead is worth above a controller that has followed it already.
            config = replace(config, prior_edge=1.0, dqn=replace(config.dqn, ensemble=_checked(network, config)))
        self.rho, self.config, self.network = rho, config, network
        self.frozen = network is not None and not online

    @classmethod
    def from_policy(cls, folder: str | Path | None, rho: float | None = None, online: bool = False) -> LossMonitor:
        """The monitor of a policy folder, with its networks where it has some.

        Args:
            folder: with ``monitor.json`` and maybe ``monitor.safetensors``; None is the package's own.
            rho: None takes what the evidence on the card allows.
            online: learn on from the policy's networks.

        Raises:
            ValueError: one of the files is damaged or not a monitor's, or was made for signals of another version.
        """
        folder = Path(folder or POLICIES)
        card, tensors = read_policy(folder, "monitor")
        with refusing(folder / "monitor.json"):
            allowed = float(card["rho"])
            return cls(allowed if rho is None else rho, network=tensors or None, online=online)

    def bind(self, terms: Terms, total_steps: int | None, seed: int) -> None:
        """Allocate the agent for the terms that may move."""
        super().bind(terms, total_steps, seed)
        self.nudges, self.gate = Nudges(terms, self.config), ForecastGate()
        self.suggestions: Counter[str] = Counter()
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
        if self.network is not None:
            self.agent.online.load_state_dict(self.network)
            self.agent.target.load_state_dict(self.network)
        self._freeze()

    def _freeze(self) -> None:
        """Have networks that do not learn at hand in the form that costs the least to ask."""
        self._frozen = in_numpy(self.agent.online) if self.frozen else None

    @property
    def identity(self) -> str:
        """Its kind and, with trained networks, how many there are and whether they learn on."""
        trained = f" of {self.config.dqn.ensemble} trained networks, {'frozen' if self.frozen else 'learning on'}"
        return super().identity + (trained if self.network is not None else "")

    @property
    def strength(self) -> float:
        """ρ times what its gate has left of it."""
        return self.rho * self.gate.share

    def gains(self) -> Tensor:
        """[K] ρ·u."""
        return self.strength * self.nudges.residual

    def after_step(self, context: Context) -> list[Event]:
        """Decide, where it is time and there is a probe."""
        if context.objective is None or context.step < self.next_decision or not self.nudges.moving or self._has_ended:
            return []
        length = context.step if self.total_steps is None else self.total_steps
        self.next_decision = context.step + self.config.interval(length)
        return self._decide(context, None if self.frozen else context.objective())

    def end_epoch(self, context: Context, metrics: Mapping[str, float]) -> list[Event]:
        """Show the gate how the epoch has ended; without a probe, decide on the select split's loss, where given."""
        loss = metrics.get("select_loss", 1 - metrics.get("select_accuracy", math.nan))
        events = self.gate.observe(context.step, float(loss), acting=bool(self.gains().any()))
        if context.objective is None and "select_loss" in metrics and self.nudges.moving:
            events += self._decide(context, float(metrics["select_loss"]))
        return events

    @property
    def _has_ended(self) -> bool:
        """Whether the last transition is stored; from then on it would only keep, and learn nothing from it."""
        return self.objective is not None and self.before is None

    def _decide(self, context: Context, objective: float | None) -> list[Event]:
        if objective is not None and not math.isfinite(objective):
            return []
        observation, mask = self.nudges.observation(context, self.strength), self.nudges.mask(context)
        over = context.signals.progress is not None and context.signals.progress > 1 - self.config.quiet_end
        self._learn(observation, mask, objective, over)
        action = first_decides(self._choose(observation, mask), context.group)
        self.objective, self.before = objective, None if over else (observation, action)
        self.nudges.rest()
        before = self.nudges.residual
        what = self.nudges.apply(action)
        if what is None:
            return []
        self.suggestions[what] += 1
        return [self._event(context, what, before)]

    def _choose(self, observation: Tensor, mask: Tensor) -> int:
        if self._frozen is None:
            return self.agent.act(observation, mask)
        return self.agent.greedy(equivariant_values(self._frozen, observation.numpy()), mask)

    def _learn(self, observation: Tensor, mask: Tensor, objective: float | None, over: bool) -> None:
        """Store the transition that ends here and learn from the replay."""
        if self.frozen or self.before is None or self.objective is None or objective is None:
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
            "rho": self.strength,
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

    def summary(self) -> dict[str, Any]:
        """What it has done, or in shadow would have: how often each action, the residual u in nats, ρ as it is now."""
        return {
            "rho": self.strength,
            "suggestions": dict(sorted(self.suggestions.items())),
            "residual": dict(zip(self.terms.names, self.nudges.residual.tolist(), strict=True)),
        }

    def state_dict(self) -> dict[str, Any]:
        """Residual, gate, agent with replay and generators, and the transition under way."""
        return {
            **super().state_dict(),
            **self.nudges.state_dict(),
            "gate": self.gate.state_dict(),
            "suggestions": dict(self.suggestions),
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
        self.gate.load_state_dict(state["gate"])
        self.suggestions = Counter(state["suggestions"])
        self.next_decision, self.objective = state["next_decision"], state["objective"]
        self.before = None if state["before"] is None else (state["before"][0].clone(), state["before"][1])
        self.rewards, self.reward_mean, self.reward_square = state["rewards"]
        self.agent.load_state_dict(state["agent"])
        self._freeze()


class RandomMonitor(LossMonitor):
    """The control: the same actions, masks and timing, chosen at random with equal chances."""

    def bind(self, terms: Terms, total_steps: int | None, seed: int) -> None:
        """Allocate as the monitor does, and a generator for the choices."""
        super().bind(terms, total_steps, seed)
        self.dice = own_generator(seed, "random monitor")

    def _choose(self, observation: Tensor, mask: Tensor) -> int:
        allowed = mask.nonzero().flatten()
        return int(allowed[torch.randint(len(allowed), (), generator=self.dice)])

    def _learn(self, observation: Tensor, mask: Tensor, objective: float | None, over: bool) -> None:
        """It does not."""

    def state_dict(self) -> dict[str, Any]:
        """The monitor's state and the dice's."""
        return super().state_dict() | {"dice": self.dice.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        super().load_state_dict(state)
        self.dice.set_state(state["dice"])


def _checked(network: Mapping[str, Tensor], config: MonitorConfig) -> int:
    """E, the number of networks whose stacked parameters these are.

    Raises:
        ValueError: they are not those of networks of the monitor's build, or there are more than 64.
    """
    count = next((len(tensor) for tensor in network.values() if tensor.dim()), 0)
    if not 1 <= count <= _MOST_NETWORKS:
        raise ValueError(f"it holds {count} networks: the monitor takes 1 to {_MOST_NETWORKS}")
    with torch.device("meta"):  # names and shapes alone, and no draw from the caller's generator
        like = stack([new_network(config)]).state_dict()
    check_like(network, {name: one.expand(count, *one.shape[1:]) for name, one in like.items()})
    return count
