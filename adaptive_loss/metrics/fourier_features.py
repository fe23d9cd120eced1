"""Fixed random features of points, in which the kernel distance sees more of a distribution than its first moments."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Generator, Tensor


class FourierFeatures:
    r"""Random Fourier features :math:`\sqrt 2 \cos(\Omega x + b)` (Rahimi & Recht 2007), a share of them at each scale.

    With :math:`\Omega_{ij} \sim N(0, 1/\ell^2)` and :math:`b_i \sim U(0, 2\pi)` their mean product approximates the
    Gaussian kernel :math:`\exp(-\lVert x - y \rVert^2 / 2\ell^2)`, averaged over the scales. Differentiable, frozen.

    Args:
        dimensions: of a point.
        scales: the lengths ℓ at which differences count, in the points' units.
        features: number of features for each scale.
        generator: draws Ω and b; another seed gives features to judge by.

    Example:
        >>> features = FourierFeatures(2, [0.5, 2.0], 64, torch.Generator().manual_seed(0))
        >>> features(torch.zeros(3, 2)).shape
        torch.Size([3, 128])
    """

    def __init__(self, dimensions: int, scales: Sequence[float], features: int, generator: Generator) -> None:
        widths = torch.tensor(scales).repeat_interleave(features)
        self.frequencies = torch.randn(dimensions, len(widths), generator=generator) / widths
        self.phases = 2 * math.pi * torch.rand(len(widths), generator=generator)

    def to(self, device: torch.device) -> FourierFeatures:
        """Itself, on ``device``."""
        self.frequencies, self.phases = self.frequencies.to(device), self.phases.to(device)
        return self

    def __call__(self, points: Tensor) -> Tensor:
        """Points ``[N, D]`` → ``[N, features × scales]``."""
        return math.sqrt(2) * torch.cos(points.float() @ self.frequencies + self.phases)
