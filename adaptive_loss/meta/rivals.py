"""What a monitor is measured against on the same small runs, and how much of what wrong weights cost each wins back.

Every rival trains the very runs of a problem, same data, initialisation and batches, and is judged by the same losses.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from adaptive_loss.meta.costs import log_finals
from adaptive_loss.meta.families.base import Family
from adaptive_loss.meta.fleet import LOST, Fleet, draw_family
from adaptive_loss.meta.problems import Problem
from adaptive_loss.meta.ruled import finish_ruled
from adaptive_loss.meta_controller import RULE
from adaptive_loss.rl.nudges import MonitorConfig
from adaptive_loss.seeding import own_generator
from adaptive_loss.trainer.recovery import interquartile_mean, recovery

TRIALS, TUNED_ON, AROUND = 24, 4, 30.0
"""Fixed weights tried, runs that each is tried on, and by what factor either way of the customary ones they lie."""
TUNING_SEEDS = 500_000
"""Added to a problem's first seed: the runs that its weights are tuned on, which nothing else has."""
EXPLORED = 1.25
"""By which factor either way a population's loser changes each weight that it has copied."""
FAR = 3.0
"""Greatest difference, in nats, from the start weights held that counts: no single run decides."""
RESAMPLES = 2000

Rival = Callable[[Problem, int], list[float]]
"""A problem and the length of its runs in steps → log J of each run."""


def base_only(problem: Problem, steps: int) -> list[float]:
    """Nothing but the base; where there is none, the customary weights."""
    fleet = _fleet(problem, steps)
    weights = _customary(fleet.family)
    if fleet.family.base is not None:
        weights = weights * torch.tensor([name == fleet.family.base for name in fleet.family.terms])
    return _held(fleet, weights)


def tuned(problem: Problem, steps: int) -> list[float]:
    """The best of 24 fixed weights, log-uniform around the customary ones, by the mean log J of four other runs."""
    seeds = [problem.seeds[0] + TUNING_SEEDS + n for n in range(TUNED_ON)]
    fleet = Fleet(draw_family(problem.family, problem.draw), seeds, steps, copies=TRIALS)
    trials = _trials(fleet.family, problem)
    found = torch.tensor(_held(fleet, trials.repeat_interleave(TUNED_ON, dim=0)))
    best = trials[found.view(TRIALS, TUNED_ON).mean(1).argmin()]
    return _held(_fleet(problem, steps), best)


def population(problem: Problem, steps: int, members: int) -> list[float]:
    """Population-based training (Jaderberg et al. 2017), ``members`` training runs for one that counts.

    The first starts from the start weights, the others up to ten times off them. As often as a monitor decides, the
    member that is worst by the objective copies the best one's parameters and optimizer and takes its weights, each
    times or over 1.25. At the end the best by the objective counts.
    """
    n = len(problem.seeds)
    fleet = Fleet(draw_family(problem.family, problem.draw), problem.seeds, steps, copies=members)
    dice = own_generator(problem.seeds[0], f"population of {members}")
    free = _free(fleet.family)
    apart = (2 * torch.rand(fleet.start.shape, generator=dice, dtype=torch.float64) - 1) * free
    apart[:n] = 0.0
    weights, every = fleet.start * 10**apart, MonitorConfig().interval(steps)
    while fleet.done < steps:
        for _ in range(min(every, steps - fleet.done)):
            fleet.step(weights)
        rows = _ranked(fleet, members)
        if members > 1 and fleet.done < steps:
            best, worst = rows[0], rows[-1]
            fleet.copy(best, worst)
            turns = torch.randint(0, 2, (n, weights.shape[1]), generator=dice) * 2.0 - 1
            weights[worst] = weights[best] * EXPLORED ** (turns * free)
    return fleet.log_judged()[_ranked(fleet, members)[0]].tolist()


def ruled(problem: Problem, steps: int, name: str) -> list[float]:
    """A rule of the field above the start weights."""
    fleet = _fleet(problem, steps)
    finish_ruled(fleet, name)
    return fleet.log_judged().tolist()


RIVALS: Mapping[str, Rival] = {
    "held": partial(log_finals, None),
    "base_only": base_only,
    "tuned": tuned,
    "lookahead_only": partial(log_finals, RULE),
    "population_2": partial(population, members=2),
    "population_4": partial(population, members=4),
    **{name: partial(ruled, name=name) for name in ("uncertainty", "dwa", "inverse_ema")},
}
"""``held`` keeps the start weights, ``lookahead_only`` is the plain look-ahead rule, the last three rules by name."""


def one_thread_finals(name: str, problem: Problem, steps: int) -> list[float]:
    """log J of a rival's runs, computed as a worker process does."""
    torch.set_num_threads(1)
    return RIVALS[name](problem, steps)


def recovered(finals: Mapping[str, Sequence[float]]) -> dict[str, dict[str, Any]]:
    """Arm → gain over the start weights held, part of what tuning gains, intervals, and the runs that were lost.

    Args:
        finals: arm → log J a run, ``held`` and ``tuned`` among them.

    Example:
        >>> finals = {"held": [1.0, 1.2, 0.9], "tuned": [0.0, 0.1, 0.0], "full": [0.1, 0.1, 0.2]}
        >>> round(recovered(finals)["full"]["recovered"], 2), recovered(finals)["full"]["lost"]
        (0.9, 0)
    """
    rows = {arm: _rows(values, finals["held"]) for arm, values in finals.items()}
    return {
        arm: {**recovery(mine, rows["held"], rows["tuned"], "test_loss"), "lost": sum(v >= LOST for v in finals[arm])}
        for arm, mine in rows.items()
        if arm not in ("held", "tuned")
    }


def overall(families: Mapping[str, Mapping[str, Sequence[float]]], arm: str) -> dict[str, Any] | None:
    """Interquartile mean over families of what ``arm`` recovers, with a bootstrap over the runs of each family.

    Only families count whose tuned weights gain something for sure; None where there are none.
    """
    sure = {name: finals for name, finals in families.items() if recovered(finals)[arm]["recovered"] is not None}
    if not sure:
        return None
    cut = [_cut(finals, arm) for finals in sure.values()]
    dice = random.Random(0)
    drawn = sorted(_middle([dice.choices(runs, k=len(runs)) for runs in cut]) for _ in range(RESAMPLES))
    ends = [drawn[int(q * (RESAMPLES - 1))] for q in (0.025, 0.975)]
    return {"families": list(sure), "recovered": _middle(cut), "recovered95": ends}


def _cut(finals: Mapping[str, Sequence[float]], arm: str) -> list[tuple[float, float]]:
    """(gain of the arm, gain of tuned) a run, cut at :data:`FAR`."""
    both = [
        [max(-FAR, min(FAR, h - x)) for h, x in zip(finals["held"], finals[n], strict=True)] for n in (arm, "tuned")
    ]
    return list(zip(*both, strict=True))


def _middle(families: Sequence[Sequence[tuple[float, float]]]) -> float:
    ratios = [sum(mine for mine, _ in runs) / sum(theirs for _, theirs in runs) for runs in families]
    return interquartile_mean(ratios) or 0.0


def _rows(values: Sequence[float], beside: Sequence[float]) -> list[dict[str, Any]]:
    cut = [max(start - FAR, min(start + FAR, value)) for value, start in zip(values, beside, strict=True)]
    return [{"seed": i, "status": "ok", "test_loss": value} for i, value in enumerate(cut)]


def _fleet(problem: Problem, steps: int) -> Fleet:
    return Fleet(draw_family(problem.family, problem.draw), problem.seeds, steps)


def _held(fleet: Fleet, weights: Tensor) -> list[float]:
    """log J a row after a run under ``weights``, [rows, K] or [K]."""
    fleet.finish(weights.expand(len(fleet), -1))
    return fleet.log_judged().tolist()


def _customary(family: Family) -> Tensor:
    return torch.tensor(family.customary, dtype=torch.float64)


def _free(family: Family) -> Tensor:
    """[K] float64: 1 for the terms whose weights may differ."""
    return torch.tensor([float(name != family.base and name not in family.pinned) for name in family.terms]).double()


def _trials(family: Family, problem: Problem) -> Tensor:
    """[TRIALS, K] weights."""
    dice = own_generator(problem.draw, f"{problem.family} trials")
    apart = 2 * torch.rand(TRIALS, len(family.terms), generator=dice, dtype=torch.float64) - 1
    return _customary(family) * AROUND ** (apart * _free(family))


def _ranked(fleet: Fleet, members: int) -> Tensor:
    """[members, N] rows, each run's best by the objective first."""
    with torch.no_grad():
        found = fleet.objective().nan_to_num(torch.inf).view(members, -1)
    n = found.shape[1]
    return found.argsort(dim=0, stable=True) * n + torch.arange(n)
