"""Steps that take turns under one clock, and what one kind of step costs more than another.

On a shared machine the same step differs by several per cent from minute to minute, which is more than an executor
costs. So arms take turns, a step each in a new order every round, and what counts is the part in which they differ:
combining the losses, and stepping. The passes through the model are the same in all.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch


class Watch:
    """Runs while a step does what other arms do otherwise or not at all; a ``with`` block, several times a step."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._start


Step = Callable[[Watch], str]
"""One training step, which says what kind of step it was."""


@dataclass(frozen=True)
class Lap:
    """One step: its kind, its seconds, and those of the part in which the arms differ."""

    kind: str
    whole: float
    part: float


def take_turns(arms: Mapping[str, Step], rounds: int) -> dict[str, list[Lap]]:
    """Each arm's steps, one a round, in a new order every round."""
    generator, names = torch.Generator().manual_seed(0), list(arms)
    laps: dict[str, list[Lap]] = {name: [] for name in names}
    for _ in range(rounds):
        for place in torch.randperm(len(names), generator=generator).tolist():
            laps[names[place]].append(_lap(arms[names[place]]))
    return laps


def _lap(step: Step) -> Lap:
    watch, start = Watch(), time.perf_counter()
    kind = step(watch)
    return Lap(kind, time.perf_counter() - start, watch.seconds)


def extra(laps: Iterable[Lap], bare: Sequence[Lap]) -> float:
    """How much longer the steps are than a bare one, as a share of it, from the parts in which they differ."""
    parts = statistics.median(lap.part for lap in laps) - statistics.median(lap.part for lap in bare)
    return parts / statistics.median(lap.whole for lap in bare)


def extra_whole(laps: Sequence[Lap], bare: Sequence[Lap]) -> float:
    """The same from whole steps, each against the bare one of its round; of noise where it is small."""
    return statistics.median(lap.whole / other.whole for lap, other in zip(laps, bare, strict=True)) - 1
