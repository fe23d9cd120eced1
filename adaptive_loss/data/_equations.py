"""Points of a differential equation on a rectangle, its known solution at those that are measured."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor

from adaptive_loss.data.base import SMALLEST_SUBSET
from adaptive_loss.data.points import PointDataset, Points
from adaptive_loss.errors import UsageError
from adaptive_loss.seeding import own_generator

Corner = tuple[float, float]
"""The lowest or the highest values of the two coordinates."""
Solution = Callable[[Tensor], Tensor]
"""Points [N, 2] → the solution there, [N, 1]."""

HELD_IN = 101_000
MEASURED = 500
"""Points of the probe split, and of the select split; a tenth of a subset below ten times as many."""


def uniform(count: int, low: Corner, high: Corner, generator: Generator) -> Tensor:
    """``count`` points drawn evenly from a rectangle, [count, 2] float32."""
    lowest, highest = torch.tensor(low), torch.tensor(high)
    return lowest + (highest - lowest) * torch.rand(count, 2, generator=generator)


def grid(shape: tuple[int, int], low: Corner, high: Corner) -> Tensor:
    """The points of a grid with its edges, [shape[0] · shape[1], 2] float32, the second coordinate running fastest.

    Example:
        >>> grid((2, 2), (0.0, -1.0), (1.0, 1.0)).tolist()
        [[0.0, -1.0], [0.0, 1.0], [1.0, -1.0], [1.0, 1.0]]
    """
    axes = [torch.linspace(a, b, steps) for a, b, steps in zip(low, high, shape, strict=True)]
    return torch.cartesian_prod(*axes)


def splits(
    name: str, low: Corner, high: Corner, shape: tuple[int, int], solution: Solution, *, seed: int, subset: int
) -> PointDataset:
    """Drawn points for train, probe and select, and a grid for the test.

    Nothing is known at the points of the train split, so its targets are NaN: a term that reads them shows it at once.

    Args:
        name: of the dataset.
        low, high: corners of the rectangle.
        shape: of the grid, which is the same for every seed and subset.
        solution: known at every point, computed in float64.
        seed: draws the points.
        subset: points of train, probe and select together.

    Raises:
        UsageError: the subset is too small.
    """
    if subset < SMALLEST_SUBSET:
        raise UsageError(f"--subset {subset} is too small to split; use {SMALLEST_SUBSET} or more")
    measured = min(MEASURED, subset // 10)
    generator = own_generator(seed, f"{name} points")
    inputs = uniform(subset - 2 * measured, low, high, generator)
    train = Points(inputs, torch.full((len(inputs), 1), math.nan))
    probe, select = (_known(uniform(measured, low, high, generator), solution) for _ in range(2))
    test = _known(grid(shape, low, high), solution)
    provenance: dict[str, object] = {
        "name": name,
        "source": f"computed from the known solution, adaptive_loss/data/{name}.py",
        "licence": "none needed: nothing of others is in it",
        "sha256": _digest(train, probe, select, test),
    }
    return PointDataset(name, train, probe, select, test, provenance)


def _known(inputs: Tensor, solution: Solution) -> Points:
    return Points(inputs, solution(inputs.double()).float())


def _digest(*parts: Points) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(part.inputs.numpy().tobytes())
        found.update(part.targets.numpy().tobytes())
    return found.hexdigest()
