"""A 5×5 grid of narrow Gaussians in the plane, where every mode that a generator drops can be counted."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Generator, Tensor

from adaptive_loss.data import datasets
from adaptive_loss.data.base import split_sizes
from adaptive_loss.data.points import PointDataset, Points
from adaptive_loss.seeding import own_generator

SIDE, SPACING, STD = 5, 2.0, 0.05
"""Gaussians along a side, the distance of neighbours, and the standard deviation of each along either axis."""
HELD_IN, TEST = 20_000, 5_000


@datasets.register("gaussians_25")
def load(data_dir: str | Path | None = None, *, seed: int = 0, subset: int = HELD_IN) -> PointDataset:
    """Points of ``¹⁄₂₅ Σᵢ N(cᵢ, 0.05²·I)`` with cᵢ the grid {−4, −2, 0, 2, 4}²; drawn here, nothing is downloaded.

    The mixture is that of Srivastava et al. (2017, "VEEGAN"). The 5,000 test points are the same for every seed.

    Args:
        data_dir: not used.
        seed: draws the held-in points.
        subset: points held in: 80 / 10 / 10% for train, probe and select.

    Raises:
        UsageError: the subset is too small to split.

    Example:
        >>> dataset = load(seed=1)
        >>> len(dataset.train), len(dataset.probe), dataset.test.inputs.shape
        (16000, 2000, torch.Size([5000, 2]))
    """
    del data_dir
    sizes = split_sizes(subset)
    held_in = draw(subset, own_generator(seed, "gaussians_25")).split(list(sizes.values()))
    test = draw(TEST, own_generator(0, "gaussians_25 test"))
    splits = {name: _points(part) for name, part in zip(sizes, held_in, strict=True)}
    provenance = _provenance(torch.cat([*held_in, test]))
    return PointDataset("gaussians_25", **splits, test=_points(test), provenance=provenance)


def centres() -> Tensor:
    """The Gaussians' means, [25, 2]."""
    axis = (torch.arange(SIDE) - SIDE // 2) * SPACING
    return torch.cartesian_prod(axis, axis)


def draw(count: int, generator: Generator) -> Tensor:
    """``count`` independent points, [count, 2]."""
    chosen = torch.randint(SIDE * SIDE, (count,), generator=generator)
    return centres()[chosen] + STD * torch.randn(count, 2, generator=generator)


def _points(inputs: Tensor) -> Points:
    return Points(inputs.clone(), torch.empty(len(inputs), 0))


def _provenance(points: Tensor) -> dict[str, object]:
    return {
        "name": "gaussians_25",
        "source": "drawn by adaptive_loss.data.gaussians_25, after Srivastava et al. (2017), arXiv:1705.07761",
        "licence": "MIT",
        "sha256": hashlib.sha256(points.numpy().tobytes()).hexdigest(),
    }
