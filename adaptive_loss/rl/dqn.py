"""Deep Q-network: double targets, a bootstrapped ensemble, action masks, and state that resumes bit for bit."""

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import huber_loss

from adaptive_loss.rl.networks import stack
from adaptive_loss.rl.replay import Batch, Replay
from adaptive_loss.rl.targets import conservative_penalty, lower_bounds, td_target

_LOSS_EMA_DECAY = 0.99


@dataclass(frozen=True)
class DQNConfig:
    """Settings of a `DQN`; a ValueError names the first one out of range."""

    gamma: float = 1.0
    """Discount per step, in [0, 1]; 1 suits an episode of finite, known length."""
    n_step: int = 3
    """Rewards summed before the bootstrap. Above 1 the target follows the behaviour that was stored: less bias from
    an untrained network, some bias from exploration."""
    double: bool = True
    """Choose the next action by the online network and value it by the target network, against overestimation."""
    ensemble: int = 3
    """Networks trained side by side, each from its own start on its own draws."""
    learning_rate: float = 1e-3
    """Adam's step size."""
    batch_size: int = 32
    """Transitions per member and update."""
    capacity: int = 2000
    """Transitions the replay holds."""
    learning_starts: int = 16
    """Transitions held before the first update."""
    target_sync: int = 50
    """Updates between two copies of the online into the target networks."""
    huber: float = 1.0
    """Temporal-difference error at which the loss turns from quadratic to linear."""
    epsilon_start: float = 0.2
    """Chance of a random action at the first step."""
    epsilon_end: float = 0.02
    """Chance of a random action after `epsilon_steps`."""
    epsilon_steps: int = 200
    """Observed steps over which that chance falls linearly."""
    conservative: float = 0.0
    """Weight α of logsumexp_b Q(s, b) − Q(s, a), which holds down actions the replay does not show; 0 is off."""
    lower_bound: float = 1.0
    """k in the bound mean − k·std over the ensemble that a move must clear to replace the default action."""
    max_grad_norm: float = 10.0
    """Gradient norm, over all members together, above which it is clipped."""

    def __post_init__(self) -> None:
        unit = ("gamma", "epsilon_start", "epsilon_end")
        not_negative = ("conservative", "lower_bound", "double")
        for name, value in vars(self).items():
            enough = value >= 0.0 if name in (*unit, *not_negative) else value > 0.0
            if not enough or (name in unit and value > 1.0):
                raise ValueError(f"DQNConfig.{name} is out of range: {value}")


@contextlib.contextmanager
def _own_mode(grad: bool) -> Iterator[None]:
    """Compute in the agent's own mode whatever autocast or gradient mode the caller is in."""
    with torch.set_grad_enabled(grad), torch.autocast("cpu", enabled=False):
        yield


class DQN(nn.Module):
    r"""Deep Q-learning with an ensemble of E networks.

    Member e minimises, on its own draw of transitions from the shared replay,

        mean_B Huber(Q_e(s, a) − y_e) + α · (logsumexp_b Q_e(s, b) − Q_e(s, a)),

    with y_e from `td_target` and its own target network, a copy of Q_e refreshed every `target_sync` updates.
    The members differ by their start and their draws, so their spread says how sure the values are. With a
    `default_action` d the greedy choice leaves d only for an action whose `lower_bounds` is above 0.

    The agent lives on the CPU in float32. Networks, exploration and replay draw from generators of its own; the
    global generators are left as they were. `state_dict()` holds the networks, the optimizer, the replay and all
    counters, and loads with `torch.load(..., weights_only=True)`.

    Args:
        make_network: builds a network that maps [..., observation_size] to [..., n_actions], whose parameters all
            belong to `nn.Linear` layers (see `networks.stack`); called E times.
        observation_size: length of a flat observation.
        n_actions: A, number of discrete actions.
        config: settings.
        seed: of every generator.
        default_action: the action to stay with unless another is better beyond doubt; None picks by the mean value.

    Raises:
        ValueError: if a size, the default action or the network does not fit.

    Reference:
        Mnih et al., *Human-level control through deep reinforcement learning*, 2015
        (https://doi.org/10.1038/nature14236); Osband et al., *Deep exploration via bootstrapped DQN*, 2016
        (https://arxiv.org/abs/1602.04621).

    Example:
        >>> import torch
        >>> from adaptive_loss.rl.dqn import DQN, DQNConfig
        >>> from adaptive_loss.rl.networks import MLPQ
        >>> agent = DQN(lambda: MLPQ(2, 3), 2, 3, DQNConfig(learning_starts=1), seed=0, default_action=0)
        >>> here, there = torch.zeros(2), torch.ones(2)
        >>> action = agent.act(here, [True, True, False])
        >>> agent.observe(here, action, 1.0, there, [True, True, True], terminated=True, truncated=False)
        >>> agent.learn() is not None, agent.updates
        (True, 1)
    """

    def __init__(
        self,
        make_network: Callable[[], nn.Module],
        observation_size: int,
        n_actions: int,
        config: DQNConfig,
        *,
        seed: int,
        default_action: int | None = None,
    ) -> None:
        super().__init__()
        if default_action is not None and not 0 <= default_action < n_actions:
            raise ValueError(f"default_action must lie in [0, {n_actions}), got {default_action}")
        self.config = config
        self.observation_size = observation_size
        self.n_actions = n_actions
        self.default_action = default_action
        replay_seed, explore_seed, *member_seeds = _spread(seed, 2 + config.ensemble)
        self.replay = Replay(
            config.capacity, observation_size, n_actions, _generator(replay_seed), config.n_step, config.gamma
        )
        self._explore = _generator(explore_seed)
        self.online = self._stacked([_build(make_network, member_seed) for member_seed in member_seeds])
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        self.optimizer = torch.optim.Adam(self.online.parameters(), lr=config.learning_rate, fused=True)
        self.transitions = 0
        self.updates = 0
        self.syncs = 0
        self.last_loss: float | None = None
        self.loss_ema: float | None = None

    def _stacked(self, members: list[nn.Module]) -> nn.Module:
        stacked = stack(members)
        rows = torch.linspace(-1.0, 1.0, 2 * self.observation_size, device="cpu").view(2, -1).float()
        with _own_mode(grad=False):
            alone = [member(rows) for member in members]
            together = stacked(rows.expand(len(members), -1, -1))
        shape = (2, self.n_actions)
        if any(values.shape != shape for values in alone):
            raise ValueError(f"make_network() must map [2, {self.observation_size}] to {list(shape)}")
        if together.shape != (len(members), *shape) or not torch.allclose(together, torch.stack(alone), atol=1e-5):
            raise ValueError("make_network() must treat every dimension before the last as a batch dimension")
        return stacked

    @property
    def epsilon(self) -> float:
        """Chance of a random action now, falling linearly with the observed steps."""
        config = self.config
        progress = min(1.0, self.transitions / config.epsilon_steps)
        return config.epsilon_start + progress * (config.epsilon_end - config.epsilon_start)

    def act(self, observation: Tensor | Sequence[float], mask: Tensor | Sequence[bool], explore: bool = True) -> int:
        """Choose an allowed action: a random one with chance `epsilon` if `explore`, else the greedy one.

        Args:
            observation: [observation_size].
            mask: [A], true where an action is allowed.
            explore: False draws nothing and is deterministic.

        Raises:
            ValueError: if no action is allowed, or the observation is not finite or has the wrong size.
        """
        allowed = self._checked_mask("mask", mask)
        checked = self._checked_observation("observation", observation)
        if explore and torch.rand((), generator=self._explore, device="cpu").item() < self.epsilon:
            choices = allowed.nonzero().flatten().tolist()
            return choices[int(torch.randint(len(choices), (), generator=self._explore, device="cpu"))]
        return self.greedy(self._values(checked), allowed)

    def greedy(self, values: Tensor | NDArray[np.float32], allowed: Tensor) -> int:
        """The action that values [E, A] speak for among those allowed, [A] bool."""
        default, given, may = self.default_action, np.asarray(values), allowed.numpy()
        scores = given.mean(0) if default is None else lower_bounds(given, default, self.config.lower_bound)
        scores = np.where(may, scores, -np.inf)
        best = int(scores.argmax())
        return best if default is None or not may[default] or scores[best] > 0 else default

    def q_values(self, observation: Tensor | Sequence[float]) -> Tensor:
        """[E, A] values of one observation by every member."""
        return self._values(self._checked_observation("observation", observation))

    def _values(self, observation: Tensor) -> Tensor:
        with _own_mode(grad=False):
            return self.online(observation.expand(self.config.ensemble, 1, -1)).squeeze(1)

    def observe(
        self,
        obs: Tensor | Sequence[float],
        action: int,
        reward: float,
        next_obs: Tensor | Sequence[float],
        next_mask: Tensor | Sequence[bool],
        terminated: bool,
        truncated: bool,
    ) -> None:
        """Store one step; see `Replay.add`. At a terminated step `next_mask` is not looked at.

        Raises:
            ValueError: if an observation or the reward is not finite, the action is unknown, or none is allowed next.
        """
        if not 0 <= action < self.n_actions:
            raise ValueError(f"action must lie in [0, {self.n_actions}), got {action}")
        if not math.isfinite(reward):
            raise ValueError(f"reward must be finite, got {reward}")
        self.replay.add(
            self._checked_observation("obs", obs),
            int(action),
            float(reward),
            self._checked_observation("next_obs", next_obs),
            self._checked_mask("next_mask", [True] * self.n_actions if terminated else next_mask),
            terminated,
            truncated,
        )
        self.transitions += 1

    def learn(self) -> float | None:
        """Make one update of every member; return the mean loss, or None while the replay holds too little."""
        return self.learn_from(self.replay) if len(self.replay) >= self.config.learning_starts else None

    def learn_from(self, replay: Replay) -> float:
        """Make one update of every member from another replay, whose observations may be of another length."""
        config = self.config
        # One draw of E·B rows is E independent bootstrap samples at the price of one.
        draw = replay.sample(config.ensemble * config.batch_size)
        batch = Batch(*(column.unflatten(0, (config.ensemble, config.batch_size)) for column in draw))
        with _own_mode(grad=True):
            loss = self._loss(batch)
            self.optimizer.zero_grad()
            # The sum over the members: each gets the gradient it would get alone.
            (loss * config.ensemble).backward()
        nn.utils.clip_grad_norm_(self.online.parameters(), config.max_grad_norm)
        self.optimizer.step()
        return self._count(loss.item())

    def _loss(self, batch: Batch) -> Tensor:
        config = self.config
        with torch.no_grad():
            target_values = self.target(batch.next_obs)
            choosing_values = self.online(batch.next_obs) if config.double else target_values
            wanted = td_target(batch, target_values, choosing_values)
        values = self.online(batch.obs)
        taken = values.gather(-1, batch.action.unsqueeze(-1)).squeeze(-1)
        loss = huber_loss(taken, wanted, delta=config.huber)
        if config.conservative:
            loss = loss + config.conservative * conservative_penalty(values, batch.action)
        return loss

    def _count(self, loss: float) -> float:
        self.updates += 1
        if self.updates % self.config.target_sync == 0:
            self.sync_target()
        self.last_loss = loss
        previous = loss if self.loss_ema is None else self.loss_ema
        self.loss_ema = _LOSS_EMA_DECAY * previous + (1.0 - _LOSS_EMA_DECAY) * loss
        return loss

    def sync_target(self) -> None:
        """Copy the online into the target networks."""
        self.target.load_state_dict(self.online.state_dict())
        self.syncs += 1

    def get_extra_state(self) -> dict[str, Any]:
        """What `state_dict` carries beside the networks: optimizer, replay, generators, counters."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "replay": self.replay.state_dict(),
            "explore": self._explore.get_state(),
            "counters": {name: getattr(self, name) for name in _COUNTERS},
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore what `get_extra_state` returned."""
        # The optimizer keeps the tensors it is given: without a copy two agents would share their moments.
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        self.replay.load_state_dict(state["replay"])
        self._explore.set_state(state["explore"])
        for name in _COUNTERS:
            setattr(self, name, state["counters"][name])

    def _checked_observation(self, name: str, value: Tensor | Sequence[float]) -> Tensor:
        observation = torch.as_tensor(value, dtype=torch.float32, device="cpu").detach()
        if observation.shape != (self.observation_size,):
            raise ValueError(f"{name} must have shape ({self.observation_size},), got {tuple(observation.shape)}")
        # One sum shows any NaN or infinity at a third of the price of isfinite().all(); the slow path then decides.
        if not math.isfinite(observation.sum().item()) and not bool(observation.isfinite().all()):
            raise ValueError(f"{name} has non-finite entries: {observation.tolist()}")
        return observation

    def _checked_mask(self, name: str, value: Tensor | Sequence[bool]) -> Tensor:
        mask = torch.as_tensor(value, dtype=torch.bool, device="cpu")
        if mask.shape != (self.n_actions,):
            raise ValueError(f"{name} must have shape ({self.n_actions},), got {tuple(mask.shape)}")
        if not bool(mask.any()):
            raise ValueError(f"{name} allows no action: at least one entry must be true")
        return mask


_COUNTERS = ("transitions", "updates", "syncs", "last_loss", "loss_ema")


def _generator(seed: int) -> torch.Generator:
    return torch.Generator(device="cpu").manual_seed(seed)


def _spread(seed: int, count: int) -> list[int]:
    """Draw `count` seeds from one."""
    return torch.randint(2**62, (count,), generator=_generator(seed), device="cpu").tolist()


def _build(make_network: Callable[[], nn.Module], seed: int) -> nn.Module:
    # Only the CPU's generator is seeded: torch.manual_seed would reseed the accelerators' too, and not give them back.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        return make_network().to(device="cpu", dtype=torch.float32)
