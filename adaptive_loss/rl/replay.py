"""Experience replay with n-step returns."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

_COLUMNS = ("obs", "action", "ret", "discount", "next_obs", "next_mask", "terminal")


class Batch(NamedTuple):
    """Transitions drawn from a `Replay`; B rows each.

    Attributes:
        obs: [B, D] observation at the first step.
        action: [B] int64 action taken there.
        ret: [B] discounted sum of the rewards that followed, R = Σ_{j<m} γ^j r_{t+j}.
        discount: [B] γ^m, where m ≤ n is how many rewards R holds.
        next_obs: [B, D] observation m steps later.
        next_mask: [B, A] bool, the actions allowed there.
        terminal: [B] bool, whether the episode ended there for good (no bootstrap).
    """

    obs: Tensor
    action: Tensor
    ret: Tensor
    discount: Tensor
    next_obs: Tensor
    next_mask: Tensor
    terminal: Tensor


class Replay:
    r"""Ring buffer of n-step transitions.

    A transition that starts at step t is stored as

        R_t = Σ_{j=0}^{m−1} γ^j r_{t+j},   discount γ^m,   bootstrap state s_{t+m},

    with m = n inside an episode. Where the episode ends earlier, the pending shorter transitions (m < n) are stored
    at once, so that no return ever crosses the boundary. The boundary is `terminated` (the value after it is 0)
    or `truncated` (time ran out: the value of the last observation still counts); where both are set, terminated wins.

    Args:
        capacity: number of transitions kept; the oldest is overwritten.
        observation_size: D, length of a flat observation.
        n_actions: A, number of discrete actions.
        generator: source of every draw; the global generator is never touched.
        n_step: n ≥ 1.
        gamma: discount γ in [0, 1].

    Raises:
        ValueError: if a size is below 1 or gamma outside [0, 1].

    Reference:
        Sutton, *Learning to predict by the methods of temporal differences*, 1988; n-step returns in deep Q-learning:
        Hessel et al., *Rainbow*, 2018 (https://arxiv.org/abs/1710.02298), section 3.

    Example:
        >>> import torch
        >>> from adaptive_loss.rl.replay import Replay
        >>> replay = Replay(8, 1, 2, torch.Generator().manual_seed(0), n_step=2, gamma=0.5)
        >>> allowed = torch.ones(2, dtype=torch.bool)
        >>> replay.add(torch.tensor([0.0]), 1, 1.0, torch.tensor([1.0]), allowed, False, False)
        >>> len(replay)  # one reward is known, two are needed
        0
        >>> replay.add(torch.tensor([1.0]), 0, 4.0, torch.tensor([2.0]), allowed, True, False)
        >>> len(replay), replay.oldest(2).ret.tolist()  # 1 + 0.5 * 4, and the shorter one
        (2, [3.0, 4.0])
    """

    def __init__(
        self,
        capacity: int,
        observation_size: int,
        n_actions: int,
        generator: torch.Generator,
        n_step: int = 1,
        gamma: float = 1.0,
    ) -> None:
        if min(capacity, observation_size, n_actions, n_step) < 1:
            raise ValueError("capacity, observation_size, n_actions and n_step must be at least 1")
        if not 0.0 <= gamma <= 1.0:
            raise ValueError(f"gamma must lie in [0, 1], got {gamma}")
        self.capacity = capacity
        self.n_step = n_step
        self.gamma = gamma
        self.generator = generator
        # A user's default device or dtype must not move the buffer: the agent lives on the CPU in float32.
        shape = {"obs": (observation_size,), "next_obs": (observation_size,), "next_mask": (n_actions,)}
        dtype = {"action": torch.int64, "next_mask": torch.bool, "terminal": torch.bool}
        self._data = Batch(
            **{
                name: torch.zeros((capacity, *shape.get(name, ())), dtype=dtype.get(name, torch.float32), device="cpu")
                for name in _COLUMNS
            }
        )
        self._size = 0
        self._cursor = 0
        self._pending: list[tuple[Tensor, int, float]] = []

    def __len__(self) -> int:
        return self._size

    def add(
        self,
        obs: Tensor,
        action: int,
        reward: float,
        next_obs: Tensor,
        next_mask: Tensor,
        terminated: bool,
        truncated: bool,
    ) -> None:
        """Take in one environment step; store whatever transitions it completes.

        Args:
            obs: [D] observation the action was chosen from.
            action: the action.
            reward: reward of this step.
            next_obs: [D] observation after it, at a boundary the last one of the ending episode.
            next_mask: [A] bool, actions allowed at `next_obs`.
            terminated: the episode ended for good: no bootstrap.
            truncated: the episode was cut off: bootstrap from `next_obs`.
        """
        self._pending.append((obs.clone(), action, reward))
        if terminated or truncated:
            while self._pending:
                self._store_oldest(next_obs, next_mask, terminated)
        elif len(self._pending) == self.n_step:
            self._store_oldest(next_obs, next_mask, False)

    def _store_oldest(self, next_obs: Tensor, next_mask: Tensor, terminal: bool) -> None:
        steps = len(self._pending)
        ret = sum(self.gamma**j * reward for j, (_, _, reward) in enumerate(self._pending))
        obs, action, _ = self._pending.pop(0)
        row = (obs, action, ret, self.gamma**steps, next_obs, next_mask, terminal)
        for column, value in zip(self._data, row, strict=True):
            column[self._cursor] = value
        self._cursor = (self._cursor + 1) % self.capacity
        self._size = min(self._size + 1, self.capacity)

    def sample(self, batch_size: int) -> Batch:
        """Draw `batch_size` transitions uniformly with replacement.

        Raises:
            ValueError: if nothing is stored yet.
        """
        if self._size == 0:
            raise ValueError("cannot sample from an empty replay: add transitions first")
        index = torch.randint(self._size, (batch_size,), generator=self.generator, device="cpu")
        return Batch(*(column[index] for column in self._data))

    def oldest(self, count: int) -> Batch:
        """The `count` oldest transitions in the order they were stored (fewer if fewer are held)."""
        start = self._cursor if self._size == self.capacity else 0
        index = (start + torch.arange(min(count, self._size), device="cpu")) % self.capacity
        return Batch(*(column[index] for column in self._data))

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to continue bit for bit: tensors, numbers and lists only."""
        return {
            # The clone keeps a save as small as what is held, and a snapshot apart from later writes.
            "columns": {name: column[: self._size].clone() for name, column in self._data._asdict().items()},
            "cursor": self._cursor,
            "pending": [[obs.clone(), action, reward] for obs, action, reward in self._pending],
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ValueError: if the saved transitions do not fit (other sizes, or a larger capacity).
        """
        columns: dict[str, Tensor] = state["columns"]
        size = len(columns["action"])
        wrapped = size == self.capacity or state["cursor"] == size
        fits = all(columns[name].shape[1:] == own.shape[1:] for name, own in self._data._asdict().items())
        if size > self.capacity or not wrapped or not fits:
            raise ValueError("the saved replay has another capacity, observation size or number of actions")
        for name, own in self._data._asdict().items():
            own[:size] = columns[name]
        self._size = size
        self._cursor = state["cursor"] % self.capacity
        self._pending = [(obs.clone(), action, reward) for obs, action, reward in state["pending"]]
        self.generator.set_state(state["generator"])
