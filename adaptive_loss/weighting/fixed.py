"""Fixed weights: the start weights, held."""

from __future__ import annotations

from torch import Tensor

from adaptive_loss.weighting import weightings
from adaptive_loss.weighting.base import Context, Weighting, ones


@weightings.register("fixed")
class Fixed(Weighting):
    """wᵢ = 1 for every term, so that the total is exactly Σᵢ startᵢ·Lᵢ.

    Choose it when you know your weights, or let controller and monitor find them; it is the strongest rival of every
    other rule once it is tuned. Metrics it logs: the weights. Deviations: none.

    Example:
        >>> import torch
        >>> from adaptive_loss import LossExecutor
        >>> executor = LossExecutor({"a": 1.0, "b": 0.5})
        >>> a, b = torch.tensor(2.0, requires_grad=True), torch.tensor(4.0, requires_grad=True)
        >>> executor({"a": a, "b": b}).item()
        4.0
    """

    def forward(self, losses: Tensor, context: Context) -> Tensor:
        """[K] ones."""
        return ones(self.n_terms)
