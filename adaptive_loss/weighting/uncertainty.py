"""Homoscedastic uncertainty weighting."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from adaptive_loss.weighting import weightings
from adaptive_loss.weighting.base import Context, Weighting


def uncertainty_weights(log_variance: Tensor) -> Tensor:
    """wᵢ = ½·exp(−sᵢ) with sᵢ = log σᵢ² (Kendall, Gal & Cipolla 2018, eq. 7 in log form). [K] → [K]."""
    return torch.exp(-log_variance) / 2


@weightings.register("uncertainty")
class Uncertainty(Weighting):
    """Total = Σᵢ Lᵢ/(2·exp(sᵢ)) + sᵢ/2, the log-variances sᵢ learned with the model.

    Reference: Kendall, Gal & Cipolla, "Multi-Task Learning Using Uncertainty to Weigh Losses", CVPR 2018.

    Choose it when the terms are likelihoods in units that cannot be compared, such as depth and labels; all of them
    count as tasks of one rank. Give ``executor.parameters()`` to the optimizer, else the sᵢ stay where they start.
    Metrics it logs: the weights ½·exp(−sᵢ). Deviations: the paper does not say where sᵢ starts; here 0, so every weight
    starts at ½. A term that is absent adds no penalty that step, else its variance would shrink without evidence.

    Example:
        >>> from adaptive_loss import LossExecutor
        >>> executor = LossExecutor({"a": 1.0, "b": 1.0}, weighting="uncertainty")
        >>> [tuple(p.shape) for p in executor.parameters()]
        [(2,)]
    """

    def __init__(self, n_terms: int) -> None:
        super().__init__(n_terms)
        self.log_variance = nn.Parameter(torch.zeros(n_terms))

    def forward(self, losses: Tensor, context: Context) -> Tensor:
        """[K] weights, differentiable in s."""
        return uncertainty_weights(self.log_variance)

    def penalty(self, context: Context) -> Tensor:
        """½ Σ sᵢ over the terms that are there."""
        return self.log_variance[context.present.to(self.log_variance.device)].sum() / 2
