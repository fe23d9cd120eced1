"""Weighing losses as a Gymnasium environment: one episode is one training run."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Discrete
from numpy.typing import NDArray

from adaptive_loss.errors import UsageError
from adaptive_loss.meta.episodes import Episodes
from adaptive_loss.meta.families import families
from adaptive_loss.meta.fleet import STEPS, draw_family
from adaptive_loss.meta_controller import CLIMB, ControllerLaw
from adaptive_loss.rl.nudges import KEEP, N_GLOBAL, N_TERM, MonitorConfig

Observation = NDArray[np.float32]


class LossWeighting(gymnasium.Env[Observation, int]):
    """``adaptive_loss/LossWeighting-v0``: nudge the loss weights of a small training run, drawn anew at every reset.

    The observation is the monitor's: 11 features of the run and 9 of each of the M terms that may move, clipped to ±5.
    The actions are the monitor's: 0 keeps, 1 resets all residuals, 2 + 2m raises term m's log-weight by log 1.25 and
    3 + 2m lowers it. ``info["action_mask"]`` and :meth:`action_masks` say which are allowed now; one that is not counts
    as keep, and ``info["was_masked"]`` says so. The reward, of :class:`~adaptive_loss.meta.episodes.Episodes`, is what
    the action won over keeping on the same batches, and at the end what the run won over one that was never nudged. An
    episode ends with its run and is never cut short.

    Args:
        family: a file name in ``adaptive_loss/meta/families``.
        law: the controller's below the nudges; None for start weights held.
        steps: length of a run in optimizer steps; a decision comes every ten.

    Raises:
        UsageError: there is no such family.

    Example:
        >>> import gymnasium
        >>> env = gymnasium.make("adaptive_loss/LossWeighting-v0", family="vae", steps=40)
        >>> observation, info = env.reset(seed=1)
        >>> observation.shape, info["action_mask"].tolist()
        ((20,), [1, 0, 0, 1])
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 - an instance variable by Gymnasium's declaration

    def __init__(self, family: str = "classifier", law: ControllerLaw | None = CLIMB, steps: int = STEPS) -> None:
        kind = families.get(family)
        least = MonitorConfig().every
        if steps < 2 * least:
            raise UsageError(f"steps is {steps}: give at least {2 * least}, two decisions")
        self.family, self.law, self.steps = kind.name, law, steps
        moving = len({*kind.terms} - {kind.base, *kind.pinned})
        self.observation_space = Box(-5.0, 5.0, (N_GLOBAL + N_TERM * moving,), np.float32)
        self.action_space = Discrete(2 + 2 * moving)  # pyright: ignore[reportAttributeAccessIssue]
        self._episodes: Episodes | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Draw a training run; its first decision comes after ten steps."""
        super().reset(seed=seed)
        draw, run = self.np_random.integers(2**31, size=2).tolist()
        self._episodes = Episodes(draw_family(self.family, draw), [run], self.law, steps=self.steps)
        return self._observation(), {"action_mask": self.action_masks()}

    def step(self, action: int) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Do one action and train on until the next decision."""
        episodes = self._running()
        if episodes.is_over:
            raise UsageError("this run has ended: call reset() for another one")
        if not self.action_space.contains(action):
            raise UsageError(f"action {action} is none: give 0 to {int(self.action_space.n) - 1}")  # pyright: ignore[reportAttributeAccessIssue]
        mask = self.action_masks()
        was_masked = not mask[int(action)]
        reward = float(episodes.act([KEEP if was_masked else int(action)]))
        info = {"action_mask": self.action_masks(), "was_masked": was_masked}
        return self._observation(), reward, episodes.is_over, False, info

    def action_masks(self) -> NDArray[np.int8]:
        """[2 + 2M] 1 where an action is allowed now."""
        return self._running().masks()[0].numpy().astype(np.int8)

    def _observation(self) -> Observation:
        return self._running().observations()[0].numpy()

    def _running(self) -> Episodes:
        if self._episodes is None:
            raise UsageError("no run has been drawn: call reset() first")
        return self._episodes
