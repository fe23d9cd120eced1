"""Episodes played to their end by one behaviour or another; a module of its own, as worker processes import it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from adaptive_loss.errors import UsageError
from adaptive_loss.meta.episodes import Episodes, gained
from adaptive_loss.meta.fleet import STEPS, draw_family
from adaptive_loss.meta.problems import Problem
from adaptive_loss.meta_controller import CLIMB, ControllerLaw
from adaptive_loss.policy_files import POLICIES
from adaptive_loss.rl.dqn import DQN, DQNConfig
from adaptive_loss.rl.nudges import KEEP, N_GLOBAL, N_TERM, MonitorConfig, look_ahead_prior, new_network
from adaptive_loss.seeding import own_generator

EXPLORES = 0.2
"""Part of a learner's actions in pre-training that are drawn at random."""
TRAINED = MonitorConfig(prior_edge=1.0, dqn=DQNConfig(n_step=4, batch_size=64, ensemble=5, conservative=0.0))
"""How networks are trained: without the look-ahead's prior, since they act on top of a controller that follows it."""

Choose = Callable[[Tensor, Tensor], int]
"""An observation [D] and a mask [A] → an allowed action."""
Network = Mapping[str, Tensor]


@dataclass(frozen=True)
class Rollout:
    """What the episodes of one problem showed, T decisions of N runs.

    Args:
        observations: [T + 1, N, D]; actions: [T, N]; rewards: [T, N]; masks: [T + 1, N, A].
        finals: [2, N] log J of the nudged runs and of those never nudged.
    """

    observations: Tensor
    actions: Tensor
    rewards: Tensor
    masks: Tensor
    finals: Tensor

    @property
    def gains(self) -> Tensor:
        """[N] log J_never − log J_nudged, clipped to ±1."""
        return gained(self.finals)


def rollout(
    problem: Problem,
    behaviours: tuple[str, ...],
    network: Network | None = None,
    law: ControllerLaw | None = CLIMB,
    steps: int = STEPS,
    forked: bool = True,
) -> Rollout:
    """Play a problem's episodes; run n behaves as ``behaviours[n mod len]`` says, see :func:`behaviour`.

    Args:
        problem: what to play.
        behaviours: names.
        network: trained parameters, for the behaviours that need some.
        law: of the controller below.
        steps: length of the runs.
        forked: whether actions are paid by forks.
    """
    torch.set_num_threads(1)
    episodes = Episodes(draw_family(problem.family, problem.draw), problem.seeds, law, TRAINED, steps, forked)
    names = [behaviours[n % len(behaviours)] for n in range(episodes.n)]
    choose = [behaviour(name, seed, network) for name, seed in zip(names, problem.seeds, strict=True)]
    observations, masks, actions, rewards = [episodes.observations()], [episodes.masks()], [], []
    while not episodes.is_over:
        seen, allowed = observations[-1], masks[-1]
        elsewhere = seen.roll(1, dims=0)
        looked_at = [(elsewhere if name == "shuffled" else seen)[n] for n, name in enumerate(names)]
        actions.append(torch.tensor([pick(looked_at[n], allowed[n]) for n, pick in enumerate(choose)]))
        rewards.append(episodes.act(actions[-1].tolist()))
        observations.append(episodes.observations())
        masks.append(episodes.masks())
    parts = (torch.stack(part) for part in (observations, actions, rewards, masks))
    return Rollout(*parts, finals=episodes.finals())


def behaviour(name: str, seed: int, network: Network | None = None) -> Choose:
    """How a run is nudged.

    ``keep`` never; ``random`` among what is allowed; ``look_ahead`` by the surest look-ahead; ``greedy`` by the
    networks' lower bound over keep; ``bold`` by their mean; ``exploring`` as that, and at random one time in five;
    ``shuffled`` is greedy, and :func:`rollout` shows it what another run sees, by which a policy that does not look
    loses nothing.

    Example:
        >>> behaviour("keep", 0)(torch.zeros(20), torch.ones(4, dtype=torch.bool))
        0
    """
    dice = own_generator(seed, f"behaviour {name}")
    if name == "keep":
        return lambda *_: KEEP
    if name == "random":
        return lambda _, allowed: _any(allowed, dice)
    if name == "look_ahead":
        return lambda seen, allowed: _best(look_ahead_prior(seen[None], 0.5)[0], allowed)
    agent = greedy_agent(network or {})
    if name in ("greedy", "shuffled"):
        return lambda seen, allowed: act(agent, seen, allowed)
    if name not in ("bold", "exploring"):
        raise ValueError(f"there is no behaviour {name!r}")
    explores = EXPLORES if name == "exploring" else 0.0

    def by_the_mean(seen: Tensor, allowed: Tensor) -> int:
        if float(torch.rand((), generator=dice)) < explores:
            return _any(allowed, dice)
        return _best(agent.online(seen.expand(TRAINED.dqn.ensemble, 1, -1)).mean(0)[0], allowed)

    return by_the_mean


def law_beside(folder: Path) -> ControllerLaw:
    """The law that a policy folder's monitor acts above: the folder's own where there is one, else the package's.

    Raises:
        UsageError: it cannot be read.
    """
    own = folder / "controller.json"
    try:
        return ControllerLaw.load(own if own.exists() else POLICIES / own.name)
    except ValueError as error:
        raise UsageError(str(error)) from error


def greedy_agent(network: Network, seed: int = 0) -> DQN:
    """An agent of the build that is trained, with these parameters; with none, fresh ones.

    One agent serves any number of terms: its sizes are those of two terms that may move, and only its own replay, which
    pre-training leaves empty, is bound to them.
    """
    agent = DQN(lambda: new_network(TRAINED), N_GLOBAL + 2 * N_TERM, 6, TRAINED.dqn, seed=seed, default_action=KEEP)
    if network:
        agent.online.load_state_dict(network)
        agent.target.load_state_dict(network)
    return agent


@torch.no_grad()
def act(agent: DQN, seen: Tensor, allowed: Tensor) -> int:
    """The agent's greedy action for any number of terms."""
    return agent.greedy(agent.online(seen.expand(agent.config.ensemble, 1, -1)).squeeze(1), allowed)


def _best(values: Tensor, allowed: Tensor) -> int:
    """The best allowed action; keep where nothing is better."""
    values = values.detach().masked_fill(~allowed, -torch.inf)
    return int(values.argmax()) if float(values.max()) > float(values[KEEP]) else KEEP


def _any(allowed: Tensor, dice: torch.Generator) -> int:
    choices = allowed.nonzero().flatten()
    return int(choices[torch.randint(len(choices), (), generator=dice)])
