"""Balancing: the reconstruction's weight from a running error that never rises."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from adaptive_loss.weighting import weightings
from adaptive_loss.weighting.base import Context, Weighting, ones
from adaptive_loss.weighting.optimal_sigma import FLOOR, gaussian_weight


def balanced_mse(mse: Tensor, batch: Tensor, decay: float = 0.99) -> Tensor:
    """mse ← min(mse, 0.99·mse + 0.01·batch) (Asperti & Trentin 2020); the first batch where mse is NaN.

    Example:
        >>> balanced_mse(torch.tensor([2.0, 2.0]), torch.tensor([1.0, 3.0]))
        tensor([1.9900, 2.0000])
    """
    return torch.where(torch.isnan(mse), batch, torch.minimum(mse, decay * mse + (1 - decay) * batch))


@weightings.register("balancing")
class Balancing(Weighting):
    """Weighs the base term, a mean squared error, by D/(2γ²) with γ² a running error that never rises.

    γ² = mse, mse ← min(mse, 0.99·mse + 0.01·batch), D the dimensions an example; every other term (the KL) weighs 1.
    As the error falls the KL's share is held, so that a VAE goes on sharpening to the end.

    Reference: Asperti & Trentin, "Balancing Reconstruction Error and Kullback-Leibler Divergence in Variational
    Autoencoders", IEEE Access 2020.

    Choose it when ``optimal_sigma`` is too nervous, as with small batches. Metrics it logs: the weights. Deviations:
    γ² starts at the first batch's error (public code: at 1), so units do not matter; it is kept above e^−12; the
    code's factor on the KL is the KL's start weight here; log γ, a constant, is left out of the total.

    Args:
        n_terms: K.
        dimensions: D an example; 1 where the other terms are means over dimensions too.
        decay: of the running error.
        floor: least γ².

    Example:
        >>> import torch
        >>> from adaptive_loss import LossExecutor
        >>> executor = LossExecutor({"mse": 1.0, "kl": 1.0}, base="mse", weighting="balancing")
        >>> p = torch.nn.Parameter(torch.tensor(0.25))
        >>> executor({"mse": p * 1, "kl": p * 2}).backward()
        >>> executor.weights  # 1/(2·0.25)
        {'mse': 2.0, 'kl': 1.0}
    """

    family = "set-point"
    needs = ("base",)
    mse: Tensor

    def __init__(self, n_terms: int, dimensions: float = 1.0, decay: float = 0.99, floor: float = FLOOR) -> None:
        super().__init__(n_terms)
        if not (dimensions > 0 and floor > 0 and 0 <= decay < 1):
            raise ValueError("Balancing needs positive dimensions and floor, and a decay in [0, 1)")
        self.dimensions, self.decay, self.floor = dimensions, decay, floor
        self.register_buffer("mse", torch.tensor(math.nan, dtype=torch.float64))

    def forward(self, losses: Tensor, context: Context) -> Tensor:
        """[K] D/(2γ²) for the base, else 1; before the first step γ² is this batch's own."""
        weights, base = ones(self.n_terms), self.terms.base_index
        if base is None:
            return weights
        mse = torch.where(torch.isnan(self.mse), losses[base], self.mse)
        if not torch.isnan(mse):
            weights[base] = gaussian_weight(mse, self.dimensions, self.floor)
        return weights

    def saturated(self) -> Tensor:
        """[K] bool, the base where γ² is within 1% of its floor."""
        return self.terms.is_base & (self.mse <= 1.01 * self.floor)

    def after_step(self, losses: Tensor, context: Context) -> None:
        """Take in the base's loss; NaN where it was absent, which counts for nothing."""
        base = self.terms.base_index
        if base is not None and torch.isfinite(losses[base]):
            # A single batch at or below 0 would otherwise hold the running error there for ever.
            self.mse = balanced_mse(self.mse, losses[base].clamp_min(self.floor), self.decay)
