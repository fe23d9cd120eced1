"""Geometric loss strategy."""

from __future__ import annotations

from torch import Tensor

from adaptive_loss.weighting import weightings
from adaptive_loss.weighting.base import Context, Weighting, ones

_LARGEST = 600.0
"""Bound of the exponent: exp(600) is still a float64."""


def gls_weights(losses: Tensor) -> Tensor:
    """wᵢ = ∂GLS/∂Lᵢ = GLS/(K·Lᵢ) of GLS = (∏ᵢ Lᵢ)^(1/K) (Chennupati et al. 2019).

    Σᵢ wᵢLᵢ is GLS itself: both the value and the gradient of the weighted sum are those of the geometric mean.

    Args:
        losses: L, [K] positive.

    Example:
        >>> import torch
        >>> gls_weights(torch.tensor([1.0, 4.0]))  # GLS = 2
        tensor([1.0000, 0.2500])
    """
    logs = losses.log()
    return (logs.mean() - logs).clamp(-_LARGEST, _LARGEST).exp() / len(losses)


@weightings.register("gls")
class GLS(Weighting):
    """Total = (∏ᵢ Lᵢ)^(1/K), as the weighted sum with wᵢ = GLS/(K·Lᵢ), so that each term has an equal share.

    The gradient is GLS times the mean of the relative gradients ∇Lᵢ/Lᵢ: the units of a term do not matter, nor does its
    start weight, which changes the total by a constant factor only.

    Reference: Chennupati et al., "MultiNet++: Multi-Stream Feature Aggregation and Geometric Loss Strategy for
    Multi-Task Learning", CVPR Workshops 2019.

    Choose it when all losses are positive, in units that cannot be compared, and far from 0. Metrics it logs: the
    weights. Deviations: only positive losses have a geometric mean. A term that is not positive this step is left out
    of the product and of K and is added with weight 1, as a term that is absent or off is left out. As a loss nears 0
    its weight grows without end, until ``Guards.bounds`` holds it.

    Args:
        n_terms: K.

    Example:
        >>> import torch
        >>> from adaptive_loss import LossExecutor
        >>> executor = LossExecutor({"a": 1.0, "b": 1.0}, weighting="gls")
        >>> a, b = torch.tensor(1.0, requires_grad=True), torch.tensor(4.0, requires_grad=True)
        >>> round(executor({"a": a, "b": b}).item(), 6), round(executor.weights["b"], 6)
        (2.0, 0.25)
    """

    jumps = True

    def forward(self, losses: Tensor, context: Context) -> Tensor:
        """[K] weights from this step's losses."""
        weights, usable = ones(self.n_terms), losses > 0
        weights[usable] = gls_weights(losses[usable])
        return weights
