"""Target shares: the user's prior about how much each term should count."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adaptive_loss.weighting import weightings
from adaptive_loss.weighting.base import Context, Weighting, ones


def share_weights(shares: Tensor) -> Tensor:
    """wᵢ = K·pᵢ/Σⱼ pⱼ: factors of mean 1 that stand in the ratio of the shares p. [K] → [K]."""
    return len(shares) * shares / shares.sum()


@weightings.register("shares")
class Shares(Weighting):
    """Constant factors wᵢ = K·pᵢ/Σⱼ pⱼ, to be multiplied to a rule that makes the terms count the same.

    A balancing rule sees startᵢ·Lᵢ and undoes the start weights by design. Multiplied to it, the shares hold: with
    ``Shares(3, [0.8, 0.1, 0.1]) * EnCodec(3)`` the first term has 80% of the gradient's length, whatever its scale.

    Choose it when you know what should count how much, and leave the units to a rule. Metrics it logs: the weights.
    Deviations: none, it is a constant.

    Args:
        n_terms: K.
        shares: p, K numbers of at least 0, not all 0; they need not sum to 1.

    Raises:
        ValueError: another number of shares, or one that is negative, not finite, or all of them 0.

    Example:
        >>> import torch
        >>> from adaptive_loss import LossExecutor
        >>> from adaptive_loss.weighting.shares import Shares
        >>> executor = LossExecutor({"a": 1.0, "b": 1.0}, weighting=Shares(2, [3, 1]))
        >>> a, b = torch.tensor(1.0, requires_grad=True), torch.tensor(1.0, requires_grad=True)
        >>> executor({"a": a, "b": b}).item(), executor.weights
        (2.0, {'a': 1.5, 'b': 0.5})
    """

    family = "prior"
    needs = ("shares",)
    factors: Tensor

    def __init__(self, n_terms: int, shares: Sequence[float] | None = None) -> None:
        super().__init__(n_terms)
        self.given = shares is not None
        values = ones(n_terms) if shares is None else torch.tensor(shares, dtype=torch.float64)
        if values.shape != (n_terms,) or not torch.isfinite(values).all() or (values < 0).any() or not values.any():
            raise ValueError(f"Shares got {shares}: give {n_terms} finite numbers of at least 0, not all 0")
        self.register_buffer("factors", share_weights(values))

    def unmet(self, context: Context) -> str | None:
        """Shares, where it was made without."""
        return None if self.given else "weighting 'shares' needs shares: make it with Shares(n_terms, [...])"

    def forward(self, losses: Tensor, context: Context) -> Tensor:
        """[K] the factors."""
        return self.factors
