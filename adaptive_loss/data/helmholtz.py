"""Helmholtz' equation on a square with a source made for a known solution."""

from __future__ import annotations

import math
from pathlib import Path

from torch import Tensor

from adaptive_loss.data import datasets
from adaptive_loss.data._equations import HELD_IN, splits
from adaptive_loss.data.points import PointDataset

WAVE_NUMBER = 1.0
FREQUENCIES = (1.0, 4.0)
LOW, HIGH = (-1.0, -1.0), (1.0, 1.0)
GRID = (100, 100)


def solution(points: Tensor) -> Tensor:
    """u = sin(a₁πx)·sin(a₂πy) with (a₁, a₂) = (1, 4), at points (x, y), [N, 2] → [N, 1]."""
    first, second = FREQUENCIES
    x, y = points[:, :1], points[:, 1:]
    return (first * math.pi * x).sin() * (second * math.pi * y).sin()


def source(points: Tensor) -> Tensor:
    """q = Δu + k²u = (k² − (a₁π)² − (a₂π)²)·u for that solution, [N, 2] → [N, 1]."""
    return (WAVE_NUMBER**2 - sum((a * math.pi) ** 2 for a in FREQUENCIES)) * solution(points)


@datasets.register("helmholtz")
def load(data_dir: str | Path | None = None, *, seed: int = 0, subset: int = HELD_IN) -> PointDataset:
    """Points (x, y) of the square [−1, 1]²: train 100,000, probe 500, select 500; test a grid of 100 × 100.

    Δu + k²u = q with k = 1 and u = 0 on the edges; q and (a₁, a₂) as in Wang, Teng & Perdikaris, "Understanding and
    Mitigating Gradient Flow Pathologies in Physics-Informed Neural Networks", SIAM Journal on Scientific Computing
    2021. Targets are u, NaN in the train split.

    Args:
        data_dir: not used; the points are computed.
        seed: draws the points of train, probe and select.
        subset: their number; below 5,000 a tenth each is measured.

    Raises:
        UsageError: the subset is too small.

    Example:
        >>> dataset = load(seed=1)
        >>> len(dataset.train), len(dataset.probe), len(dataset.select), len(dataset.test)
        (100000, 500, 500, 10000)
    """
    del data_dir
    return splits("helmholtz", LOW, HIGH, GRID, solution, seed=seed, subset=subset)
