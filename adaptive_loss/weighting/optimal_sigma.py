"""σ-VAE: the decoder's variance at its optimum."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from adaptive_loss.weighting import weightings
from adaptive_loss.weighting.base import Context, Weighting, ones

FLOOR = math.exp(-12)
"""Least variance, log σ = −6: where the public σ-VAE clips it."""


def gaussian_weight(variance: Tensor, dimensions: float = 1.0, floor: float = FLOOR) -> Tensor:
    """D/(2σ²), what a mean squared error weighs in a Gaussian's −log p of D dimensions (Rybkin et al. 2021).

    Args:
        variance: σ², any shape.
        dimensions: D.
        floor: least σ².

    Example:
        >>> gaussian_weight(torch.tensor([0.25, 0.0]), 8, floor=0.01)
        tensor([ 16., 400.])
    """
    return dimensions / (2 * variance.clamp_min(floor))


@weightings.register("optimal_sigma")
class OptimalSigma(Weighting):
    """Weighs the base term, a mean squared error over D dimensions, by D/(2σ²) with σ² = MSE, its optimum.

    −log p = D·MSE/(2σ²) + D·log σ is least in σ at σ² = MSE. There the gradient of the whole in the model's parameters
    is that of the first part with σ held, so no penalty is needed. Every other term (the KL) weighs 1. A sum of
    squares over the D dimensions takes the same weight, D/(2σ²)·MSE = S/(2·S/D).

    Reference: Rybkin, Daniilidis & Levine, "Simple and Effective VAE Training with Calibrated Decoders", ICML 2021.

    Choose it when a VAE is trained with a squared error and nobody knows its KL weight. Metrics it logs: the weights.
    Deviations: σ² is kept from below by a hard floor, e^−12, where the paper's code clips softly; the base's start
    weight cancels (σ² is that of startᵢ·Lᵢ), the others' still multiply.

    Args:
        n_terms: K.
        dimensions: D an example; 1 where the other terms are means over dimensions too.
        decay: of the running σ²; 0 takes the batch's own.
        floor: least σ².

    Example:
        >>> import torch
        >>> from adaptive_loss import LossExecutor
        >>> from adaptive_loss.weighting.optimal_sigma import OptimalSigma
        >>> executor = LossExecutor({"mse": 1.0, "kl": 1.0}, base="mse", weighting=OptimalSigma(2, dimensions=784))
        >>> p = torch.nn.Parameter(torch.tensor(0.02))
        >>> executor({"mse": p * 1, "kl": p * 100}).backward()
        >>> {name: round(weight, 2) for name, weight in executor.weights.items()}  # 784/(2·0.02)
        {'mse': 19600.0, 'kl': 1.0}
    """

    family = "set-point"
    needs = ("base",)
    jumps = True
    variance: Tensor

    def __init__(self, n_terms: int, dimensions: float = 1.0, decay: float = 0.0, floor: float = FLOOR) -> None:
        super().__init__(n_terms)
        if not (dimensions > 0 and floor > 0 and 0 <= decay < 1):
            raise ValueError("OptimalSigma needs positive dimensions and floor, and a decay in [0, 1)")
        self.dimensions, self.decay, self.floor = dimensions, decay, floor
        self.register_buffer("variance", torch.tensor(math.nan, dtype=torch.float64))

    def forward(self, losses: Tensor, context: Context) -> Tensor:
        """[K] D/(2σ²) for the base, else 1; 1 until the base has been there."""
        weights, base = ones(self.n_terms), self.terms.base_index
        if base is None:
            return weights
        running, own = self.variance, losses[base]
        first, second = (running, own) if self.decay else (own, running)
        variance = torch.where(torch.isnan(first), second, first)
        if not torch.isnan(variance):
            weights[base] = gaussian_weight(variance, self.dimensions, self.floor)
        return weights

    def saturated(self) -> Tensor:
        """[K] bool, the base where σ² is at its floor."""
        return self.terms.is_base & (self.variance <= self.floor)

    def after_step(self, losses: Tensor, context: Context) -> None:
        """Take in the base's loss; NaN where it was absent, which counts for nothing."""
        base = self.terms.base_index
        if base is None or not torch.isfinite(losses[base]):
            return
        before = torch.where(torch.isnan(self.variance), losses[base], self.variance)
        self.variance = self.decay * before + (1 - self.decay) * losses[base]
