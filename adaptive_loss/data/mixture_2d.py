"""A mixture of Gaussians in the plane, at two scales: samples whose density, diffused by any noise, is known."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Generator, Tensor

from adaptive_loss.data import datasets
from adaptive_loss.data.base import split_sizes
from adaptive_loss.data.points import PointDataset, Points
from adaptive_loss.seeding import own_generator

HELD_IN, TEST = 10_000, 10_000
DEVIATION = 0.5
"""Of each coordinate over the whole mixture: σ_data of Karras et al. 2022."""
SPREAD = 0.03
"""Of each component."""
NEAR, CORNERS = 0.18, 4
"""Four components lie at distance 0.18 around each of four centres."""


@dataclass(frozen=True, eq=False)
class Mixture:
    """Equally likely Gaussians N(μⱼ, s²I).

    Attributes:
        means: μⱼ, float32 ``[J, D]``.
        spread: s.

    Example:
        >>> one = Mixture(torch.zeros(1, 2), spread=1.0)
        >>> one.denoised(torch.tensor([[2.0, 0.0]]), torch.tensor([1.0]))  # s²/(s² + σ²) of the way back
        tensor([[1., 0.]])
    """

    means: Tensor
    spread: float

    def sample(self, count: int, generator: Generator) -> Tensor:
        """``[count, D]`` points."""
        chosen = torch.randint(len(self.means), (count,), generator=generator)
        noise = torch.randn(count, self.means.shape[1], generator=generator)
        return self.means[chosen] + self.spread * noise

    def log_density(self, points: Tensor, sigma: Tensor) -> Tensor:
        """log p(x; σ) of the mixture with noise of deviation σ added. ``[N, D]``, ``[N]`` → ``[N]``."""
        variance = sigma.square() + self.spread**2
        dimensions = self.means.shape[1]
        constant = dimensions / 2 * (2 * math.pi * variance).log() + math.log(len(self.means))
        return self._exponents(points, variance).logsumexp(1) - constant

    def denoised(self, points: Tensor, sigma: Tensor) -> Tensor:
        """The best denoiser E[y | y + σn = x] = Σⱼ rⱼ(x)·(μⱼ + s²/(s² + σ²)·(x − μⱼ)), r the components' shares.

        The score follows from it: ∇log p(x; σ) = (E[y | x] − x)/σ² (Karras et al. 2022, eq. 3).

        Args:
            points: x, ``[N, D]``.
            sigma: σ, ``[N]``.
        """
        variance = sigma.square() + self.spread**2
        nearest = self._exponents(points, variance).softmax(1) @ self.means.to(points)
        kept = (self.spread**2 / variance)[:, None]
        return nearest + kept * (points - nearest)

    def _exponents(self, points: Tensor, variance: Tensor) -> Tensor:
        distances = (points[:, None] - self.means.to(points)).square().sum(2)
        return -distances / (2 * variance[:, None])


@dataclass(frozen=True, eq=False)
class MixtureDataset(PointDataset):
    """Samples of a mixture that is known.

    Attributes:
        mixture: what they were drawn from.
    """

    mixture: Mixture


def two_scales() -> Mixture:
    """Sixteen components, four around each of four centres, of deviation 0.5 a coordinate.

    Σ of variances: R²/2 + r²/2 + s² = 0.25, with R the centres' distance from 0 and r the components' from theirs.
    """
    far = math.sqrt(2 * (DEVIATION**2 - SPREAD**2) - NEAR**2)
    angles = torch.arange(CORNERS) * (2 * math.pi / CORNERS)
    circle = torch.stack([angles.cos(), angles.sin()], dim=1)
    turned = torch.stack([(angles + math.pi / CORNERS).cos(), (angles + math.pi / CORNERS).sin()], dim=1)
    return Mixture((far * turned[:, None] + NEAR * circle).view(-1, 2), SPREAD)


@datasets.register("mixture_2d")
def load(data_dir: str | Path | None = None, *, seed: int = 0, subset: int = HELD_IN) -> MixtureDataset:
    """Samples of :func:`two_scales`: 80 / 10 / 10 % of ``subset`` for train, probe and select, and 10,000 for the test.

    The test points are the same for every seed and subset.

    Args:
        data_dir: not used; the points are drawn.
        seed: of the points held in.
        subset: how many.

    Raises:
        UsageError: the subset is too small.

    Example:
        >>> dataset = load(seed=1)
        >>> len(dataset.train), len(dataset.probe), len(dataset.select), len(dataset.test)
        (8000, 1000, 1000, 10000)
    """
    del data_dir
    sizes = split_sizes(subset)
    mixture = two_scales()
    held_in = mixture.sample(subset, own_generator(seed, "mixture_2d"))
    test = mixture.sample(TEST, own_generator(0, "mixture_2d test"))
    parts = dict(zip(sizes, held_in.split(list(sizes.values())), strict=True), test=test)
    splits = {name: Points(part, part.new_empty(len(part), 0)) for name, part in parts.items()}
    return MixtureDataset("mixture_2d", **splits, provenance=_provenance(held_in, test), mixture=mixture)


def _provenance(*parts: Tensor) -> dict[str, object]:
    digest = hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()
    source = "drawn from sixteen Gaussians in the plane"
    return {"name": "mixture_2d", "source": source, "licence": "none needed", "sha256": digest}
