"""What a law costs on small training runs; a module of its own, since worker processes import it by name."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from functools import cache

import torch

from adaptive_loss.meta.problems import FAMILIES, sample, train
from adaptive_loss.meta_controller import CLIMB, ControllerLaw


def cost(law: ControllerLaw, problems: Sequence[tuple[str, int]]) -> float:
    """Mean clipped log-ratio of final losses, law over the one it starts from; below 0 is better."""
    return statistics.fmean(differences(law, problems))


def differences(law: ControllerLaw, problems: Sequence[tuple[str, int]]) -> list[float]:
    """The log-ratio on each problem, clipped to ±1 so that no single run decides."""
    return [max(-1.0, min(1.0, _final(law, *p) - _final(CLIMB, *p))) for p in problems]


def _final(law: ControllerLaw, family: str, seed: int) -> float:
    return _first_final(family, seed) if law == CLIMB else _log_final(law, family, seed)


@cache
def _first_final(family: str, seed: int) -> float:
    return _log_final(CLIMB, family, seed)


def _log_final(law: ControllerLaw, family: str, seed: int) -> float:
    final = train(sample(family, seed), law, seed)
    return math.log(final) if 0 < final < 1e30 else 30.0


def draw_problems(count: int, first_seed: int) -> list[tuple[str, int]]:
    """``count`` problems, the families in turn."""
    families = list(FAMILIES)
    return [(families[i % len(families)], first_seed + i) for i in range(count)]


def one_thread_cost(law: ControllerLaw, problems: Sequence[tuple[str, int]]) -> float:
    """:func:`cost`, computed as a worker process does: on one thread, so that cores are not asked for twice."""
    torch.set_num_threads(1)
    return cost(law, problems)


def one_thread_log_finals(laws: Sequence[ControllerLaw], problem: tuple[str, int]) -> list[float]:
    """log of each law's final loss on one problem, computed as a worker process does."""
    torch.set_num_threads(1)
    return [_log_final(law, *problem) for law in laws]
