"""What a law costs on small training runs; a module of its own, since worker processes import it by name."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import cache

import torch

from adaptive_loss.meta.fleet import STEPS, Fleet, draw_family
from adaptive_loss.meta.problems import Problem
from adaptive_loss.meta.steering import steer
from adaptive_loss.meta_controller import CLIMB, ControllerLaw


def log_finals(law: ControllerLaw | None, problem: Problem, steps: int = STEPS) -> list[float]:
    """log of each run's judged loss under a law (None: start weights held); a lost run's is 30."""
    fleet = Fleet(draw_family(problem.family, problem.draw), problem.seeds, steps)
    if law is None:
        fleet.finish(fleet.start)
    else:
        steer(fleet, law)
    return fleet.log_judged().tolist()


def differences(law: ControllerLaw, problem: Problem, steps: int = STEPS) -> list[float]:
    """Each run's log-ratio of judged losses, law over the one it starts from, clipped so that no single run decides."""
    pairs = zip(log_finals(law, problem, steps), _first_finals(problem, steps), strict=True)
    return [max(-1.0, min(1.0, mine - first)) for mine, first in pairs]


def cost(law: ControllerLaw, problems: Sequence[Problem], steps: int = STEPS) -> float:
    """Mean over families of :func:`differences`; below 0 is better."""
    return statistics.fmean(statistics.fmean(differences(law, problem, steps)) for problem in problems)


@cache
def _first_finals(problem: Problem, steps: int) -> list[float]:
    return log_finals(CLIMB, problem, steps)


def one_thread_cost(law: ControllerLaw, problems: Sequence[Problem], steps: int) -> float:
    """:func:`cost`, computed as a worker process does: on one thread, so that cores are not asked for twice."""
    torch.set_num_threads(1)
    return cost(law, problems, steps)


def one_thread_differences(law: ControllerLaw, problem: Problem, steps: int) -> list[float]:
    """:func:`differences`, computed as a worker process does."""
    torch.set_num_threads(1)
    return differences(law, problem, steps)


def one_thread_log_finals(laws: Sequence[ControllerLaw | None], problem: Problem, steps: int) -> list[list[float]]:
    """:func:`log_finals` of each law, computed as a worker process does."""
    torch.set_num_threads(1)
    return [log_finals(law, problem, steps) for law in laws]
