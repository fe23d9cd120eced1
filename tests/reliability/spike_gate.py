"""The spike gate lets clean heavy-tailed losses pass, stops every spike, learns from none and is over it at once.

    python -m tests.reliability.spike_gate

Each family of clean losses is 1e6 steps, 64 series side by side. Then spikes are put between the steps of each: all
must be stopped, and each step after one must be judged as if the spike had never been.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from adaptive_loss.spike_gate import SpikeGate
from tests.reliability.rows import Row

SERIES, WINDOW = 64, 64
EVERYWHERE = torch.ones(SERIES, dtype=torch.bool)
MOST_FALSE = 1e-3


def _normal(length: int, dice: torch.Generator) -> Tensor:
    return torch.randn(length, SERIES, generator=dice, dtype=torch.float64)


def _uniform(length: int, dice: torch.Generator) -> Tensor:
    return torch.rand(length, SERIES, generator=dice, dtype=torch.float64).clamp(1e-15, 1 - 1e-15)


def _student(length: int, dice: torch.Generator, freedom: int) -> Tensor:
    chi = sum(_normal(length, dice).square() for _ in range(freedom))
    return _normal(length, dice) / (chi / freedom).sqrt()


def _wandering(length: int, dice: torch.Generator) -> Tensor:
    """log L follows x ← 0.99x + noise: losses that stay high or low for a hundred steps."""
    level, rows = torch.zeros(SERIES, dtype=torch.float64), []
    for shock in 0.1 * _normal(length, dice):
        level = 0.99 * level + shock
        rows.append(level)
    return torch.stack(rows).exp()


def _falling(length: int, dice: torch.Generator) -> Tensor:
    """A loss that falls as t^(−1/2) with heavy-tailed noise on it, as in training."""
    time = torch.arange(1, length + 1, dtype=torch.float64)[:, None]
    return time**-0.5 * (0.3 * _student(length, dice, 3)).exp()


FAMILIES: dict[str, Callable[[int, torch.Generator], Tensor]] = {
    "lognormal, sigma 2": lambda n, dice: (2 * _normal(n, dice)).exp(),
    "lognormal, sigma 0.3": lambda n, dice: (0.3 * _normal(n, dice)).exp(),
    "Pareto 1.5": lambda n, dice: _uniform(n, dice) ** (-1 / 1.5),
    "Pareto 1.1": lambda n, dice: _uniform(n, dice) ** (-1 / 1.1),
    "Weibull 0.5": lambda n, dice: (-_uniform(n, dice).log()) ** 2,
    "Student t3 around 10": lambda n, dice: 10 + _student(n, dice, 3),
    "Student t2 around 0": lambda n, dice: _student(n, dice, 2),
    "wandering": _wandering,
    "falling": _falling,
}


def false_skips(series: Tensor) -> int:
    """How many of a clean series' values, [T, 64], are called spikes."""
    gate, count = SpikeGate(SERIES, WINDOW), 0
    for values in series:
        over = values > gate.limits
        count += int(over.sum())
        gate.admit(torch.where(over, math.nan, values))
    return count


def spikes_missed(series: Tensor, dice: torch.Generator) -> int:
    """How often a spike between a series' steps passes, or a step is judged otherwise than without any spike."""
    gate, twin, missed = SpikeGate(SERIES, WINDOW), SpikeGate(SERIES, WINDOW), 0
    for values in series:
        if torch.rand((), generator=dice) < 0.3 and bool(torch.isfinite(gate.limits).all()):
            factor = 1 + 10 ** (20 * torch.rand((), generator=dice, dtype=torch.float64) - 1)
            missed += gate.worst(torch.maximum(gate.limits * factor, gate.limits + 1), EVERYWHERE) is None
        over = values > gate.limits
        missed += not torch.equal(gate.limits, twin.limits)
        for each in (gate, twin):
            each.admit(torch.where(over, math.nan, values))
    return missed


def torture(steps: int = 1_000_000) -> Row:
    """The row of the table."""
    dice, worst, failures = torch.Generator().manual_seed(0), (0.0, ""), 0
    for name, family in FAMILIES.items():
        series = family(steps // SERIES, dice)
        share = false_skips(series) / series.numel()
        worst = max(worst, (share, name))
        failures += (share > MOST_FALSE) + spikes_missed(series[:2000], dice)
    note = f"{len(FAMILIES)} families; most false skips {100 * worst[0]:.4f}% ({worst[1]}), at most 0.1% allowed"
    return Row("spike gate", steps * len(FAMILIES), failures, note)


if __name__ == "__main__":
    print(torture())
