"""Precision, recall, density and coverage: how real samples look, and how much of what is real they cover."""

from __future__ import annotations

import torch
from torch import Tensor

from adaptive_loss.metrics._samples import check_samples

BLOCK = 1000  # rows of distances at a time


def precision_recall_density_coverage(samples: Tensor, reference: Tensor, k: int = 5) -> dict[str, float]:
    """The four shares, each from balls around a point that reach to its k-th nearest neighbour of its own set.

    With Bᵢ the ball of reference point yᵢ and B′ⱼ that of sample xⱼ (on the rim counts as inside):

    - precision: share of samples in any Bᵢ (Kynkäänniemi et al. 2019);
    - recall: share of reference points in any B′ⱼ;
    - density: Σⱼ Σᵢ 1[xⱼ ∈ Bᵢ] / (k·m), above 1 where samples crowd together (Naeem et al. 2020);
    - coverage: share of Bᵢ that hold a sample.

    In features of our own, so not comparable with published numbers.

    Args:
        samples: x, ``[m, D]``.
        reference: y, ``[n, D]``.
        k: neighbours that make a ball.

    Raises:
        ValueError: k is below 1, m or n below k + 1, or the shapes differ.

    Example:
        >>> points = torch.tensor([[0.0], [1.0], [2.0]])
        >>> precision_recall_density_coverage(points, points, k=1)["coverage"]
        1.0
    """
    if k < 1:
        raise ValueError(f"k is {k}; give at least 1 neighbour")
    check_samples(f"precision and recall with k = {k}", k + 1, samples=samples, reference=reference)
    x, y = samples.detach().double(), reference.detach().double()
    radius, own_radius = _radii(y, k), _radii(x, k)
    reached, recalled = torch.zeros(len(x), dtype=torch.long), torch.zeros(len(y), dtype=torch.bool)
    covered = torch.zeros(len(y), dtype=torch.bool)
    for rows in torch.arange(len(x)).split(BLOCK):
        distance = _distance(x[rows], y)
        inside = distance <= radius
        reached[rows] = inside.sum(1).cpu()
        covered |= inside.any(0).cpu()
        recalled |= (distance <= own_radius[rows, None]).any(0).cpu()
    return {
        "precision": float((reached > 0).double().mean()),
        "recall": float(recalled.double().mean()),
        "density": float(reached.double().mean() / k),
        "coverage": float(covered.double().mean()),
    }


def _radii(points: Tensor, k: int) -> Tensor:
    """[N] distance of each point to its k-th nearest other one (itself, at distance 0, is the first of k + 1)."""
    return torch.cat([_distance(rows, points).kthvalue(k + 1).values for rows in points.split(BLOCK)])


def _distance(x: Tensor, y: Tensor) -> Tensor:
    # Not by the matrix product: a point's distance to itself must be 0, and equal distances equal to the last bit.
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
