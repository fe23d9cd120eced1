"""Fréchet distance between Gaussians fitted to two sets of features."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from adaptive_loss.metrics._samples import check_samples


def frechet_distance(samples: Tensor, reference: Tensor) -> float:
    """Distance of the Gaussians with the mean and (unbiased) covariance of each set (Heusel et al. 2017).

    The number shrinks as samples grow (it is biased), so compare only equal numbers of them. In features of our own,
    so **not comparable with FID in Inception features**. NaN where a feature is not finite.

    Args:
        samples, reference: ``[N, D]``; the two N may differ.

    Raises:
        ValueError: N is below D + 1, where no covariance has full rank, or the shapes differ.

    Example:
        >>> corners = torch.tensor([[0.0], [2.0]])
        >>> frechet_distance(corners, corners + 3)
        9.0
    """
    check_samples("the Fréchet distance", least_samples(samples.shape[-1]), samples=samples, reference=reference)
    x, y = samples.detach().double(), reference.detach().double()
    if not (torch.isfinite(x).all() and torch.isfinite(y).all()):
        return math.nan
    return gaussian_distance(x.mean(0), _covariance(x), y.mean(0), _covariance(y))


def least_samples(features: int) -> int:
    """Samples that D features need."""
    return features + 1


def gaussian_distance(mean: Tensor, covariance: Tensor, other_mean: Tensor, other_covariance: Tensor) -> float:
    """Squared 2-Wasserstein distance ‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2(Σ₁½ Σ₂ Σ₁½)½) (Dowson & Landau 1982).

    Args:
        mean, other_mean: ``[D]``.
        covariance, other_covariance: ``[D, D]``, symmetric and positive semi-definite.
    """
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ other_covariance @ root).clamp_min(0).sqrt().sum()
    apart = (mean - other_mean).square().sum()
    return float(apart + covariance.trace() + other_covariance.trace() - 2 * cross)


def _covariance(features: Tensor) -> Tensor:
    return torch.atleast_2d(torch.cov(features.T))
