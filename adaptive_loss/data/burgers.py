"""Burgers' equation with a shock that forms at x = 0: points, and the solution from its closed form."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from adaptive_loss.data import datasets
from adaptive_loss.data._equations import HELD_IN, splits
from adaptive_loss.data.points import PointDataset

VISCOSITY = 0.01 / math.pi
LOW, HIGH = (0.0, -1.0), (1.0, 1.0)
GRID = (100, 256)
NODES = 100
"""Of the quadrature: with 64 the solution is exact to 1e-9, with 100 to rounding (measured against 200)."""


def start(x: Tensor) -> Tensor:
    """u(0, x) = −sin πx."""
    return -(math.pi * x).sin()


def solution(points: Tensor) -> Tensor:
    r"""u at points (t, x), [N, 2] float64 → [N, 1], for any t ≥ 0; differentiable.

    By the transformation of Cole and Hopf, with :math:`y = x - \sqrt{4\nu t}\,z` (Basdevant et al. 1986, "Spectral and
    finite difference solutions of the Burgers equation", Computers & Fluids 14),

    .. math:: u(t, x) = -\frac{\int \sin(\pi y)\, e^{-\cos(\pi y)/2\pi\nu}\, e^{-z^2} dz}
                              {\int e^{-\cos(\pi y)/2\pi\nu}\, e^{-z^2} dz}

    and both integrals by Gauss–Hermite quadrature.

    Example:
        >>> solution(torch.tensor([[0.0, 0.5], [0.7, 0.0]], dtype=torch.float64)).flatten().round(decimals=6).tolist()
        [-1.0, 0.0]
    """
    nodes, weights = (torch.from_numpy(part).to(points) for part in np.polynomial.hermite.hermgauss(NODES))
    t, x = points[:, :1], points[:, 1:]
    y = math.pi * (x - (4 * VISCOSITY * t).sqrt() * nodes)
    mass = weights * (-y.cos() / (2 * math.pi * VISCOSITY)).exp()
    return -(y.sin() * mass).sum(1, keepdim=True) / mass.sum(1, keepdim=True)


@datasets.register("burgers")
def load(data_dir: str | Path | None = None, *, seed: int = 0, subset: int = HELD_IN) -> PointDataset:
    """Points (t, x) with t in [0, 1] and x in [−1, 1]: train 100,000, probe 500, select 500; test a grid of 100 × 256.

    u_t + u·u_x = (0.01/π)·u_xx with u(0, x) = −sin πx and u(t, ±1) = 0. Targets are u, NaN in the train split.

    Args:
        data_dir: not used; the points are computed.
        seed: draws the points of train, probe and select.
        subset: their number; below 5,000 a tenth each is measured.

    Raises:
        UsageError: the subset is too small.

    Example:
        >>> dataset = load(seed=1)
        >>> len(dataset.train), len(dataset.probe), len(dataset.select), len(dataset.test)
        (100000, 500, 500, 25600)
    """
    del data_dir
    return splits("burgers", LOW, HIGH, GRID, solution, seed=seed, subset=subset)
