"""Dynamic weight average."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from adaptive_loss.weighting import weightings
from adaptive_loss.weighting.base import Context, Weighting, ones


def dwa_weights(last: Tensor, before: Tensor, temperature: float) -> Tensor:
    """wᵢ = K·softmax(rᵢ/T) with rᵢ = L̄ᵢ(e−1)/L̄ᵢ(e−2) (Liu, Johns & Davison 2019, eq. 7).

    Args:
        last, before: [K] mean losses of the last epoch and the one before; a term whose ratio cannot be told
            (absent in one of them, or a mean of 0) counts as 1, neither falling nor rising.
        temperature: T > 0; greater is more even.

    Example:
        >>> dwa_weights(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 2.0]), 2.0)
        tensor([0.8756, 1.1244])
    """
    ratio = (last / before).nan_to_num(1.0, 1.0, 1.0)
    return len(ratio) * torch.softmax(ratio / temperature, dim=0)


@weightings.register("dwa")
class DWA(Weighting):
    """Weights terms by how slowly their epoch means fall: w = K·softmax(r/T), uniform for two epochs.

    Reference: Liu, Johns & Davison, "End-to-End Multi-Task Learning with Attention", CVPR 2019.

    Choose it when tasks of like size train at different speeds and epochs are many. Needs ``executor.end_epoch()``;
    without it the weights stay at 1. Metrics it logs: the weights. Deviations: terms that are off are left out of K; a
    ratio that cannot be told counts as 1.

    Args:
        n_terms: K.
        temperature: T, 2 in the paper.

    Example:
        >>> from adaptive_loss import LossExecutor
        >>> LossExecutor({"a": 1.0, "b": 1.0}, weighting="dwa").weights
        {'a': 1.0, 'b': 1.0}
    """

    needs = ("epochs",)
    total: Tensor
    count: Tensor
    means: Tensor

    def __init__(self, n_terms: int, temperature: float = 2.0) -> None:
        super().__init__(n_terms)
        if not temperature > 0:
            raise ValueError(f"DWA's temperature is {temperature}: give a positive number")
        self.temperature = temperature
        self.register_buffer("total", torch.zeros(n_terms, dtype=torch.float64))
        self.register_buffer("count", torch.zeros(n_terms, dtype=torch.float64))
        self.register_buffer("means", torch.full((2, n_terms), torch.nan, dtype=torch.float64))

    def forward(self, losses: Tensor, context: Context) -> Tensor:
        """[K] weights, which change at the ends of epochs only."""
        before, last = self.means
        known = ~(torch.isnan(before) & torch.isnan(last))
        if torch.isnan(before).all() or not known.any():
            return ones(self.n_terms)
        weights = ones(self.n_terms)
        weights[known] = dwa_weights(last[known], before[known], self.temperature)
        return weights

    def after_step(self, losses: Tensor, context: Context) -> None:
        """Add this step's losses to the epoch's means."""
        self.total = self.total + losses.nan_to_num(0.0)
        self.count = self.count + ~torch.isnan(losses)

    def end_epoch(self, metrics: Mapping[str, float]) -> None:
        """Shift the epoch's means into the history; an epoch without an accepted step is none."""
        if not self.count.any():
            return
        self.means = torch.stack([self.means[1], self.total / self.count])
        self.total = torch.zeros_like(self.total)
        self.count = torch.zeros_like(self.count)
