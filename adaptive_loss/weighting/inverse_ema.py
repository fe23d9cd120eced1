"""Inverse running means."""

from __future__ import annotations

import torch
from torch import Tensor

from adaptive_loss.weighting import weightings
from adaptive_loss.weighting.base import Context, Weighting, ones
from adaptive_loss.weighting.gradient_rule import averaged

_LEAST, _GREATEST = 1e-7, 1e7


def inverse_weights(means: Tensor) -> Tensor:
    """wᵢ = clip(1/mᵢ, 1e−7, 1e7) with mᵢ ≥ 0 the running mean of |Lᵢ|. [K] → [K].

    Example:
        >>> inverse_weights(torch.tensor([4.0, 0.0])).tolist()
        [0.25, 10000000.0]
    """
    return (1 / means).clamp(_LEAST, _GREATEST)


@weightings.register("inverse_ema")
class InverseEMA(Weighting):
    """wᵢ = 1/mᵢ with mᵢ the running mean of |Lᵢ| with decay β, clipped to 1e±7: every term adds about 1.

    Reference: ``AdaptiveLossWeight`` of Stable Cascade's training code, over buckets of noise levels; its architecture
    is that of Pernias et al., "Würstchen: An Efficient Architecture for Large-Scale Text-to-Image Diffusion Models",
    ICLR 2024.

    Choose it when the terms are one loss in buckets, such as a diffusion loss by noise level, whose sizes differ by
    orders of magnitude. Metrics it logs: the weights. Deviations: the mean is corrected for its start, where the source
    starts it at 1, so a rare bucket is as heavy as a frequent one and the units do not matter; a bucket that was never
    seen weighs 1. The size |Lᵢ| is averaged, so a negative loss has a weight too. A bucket without samples this step is
    an absent term and keeps its mean.

    Args:
        n_terms: K, the number of buckets.
        decay: β in [0, 1).

    Raises:
        ValueError: a decay outside [0, 1).

    Example:
        >>> import torch
        >>> from adaptive_loss import LossExecutor
        >>> from adaptive_loss.weighting.inverse_ema import InverseEMA
        >>> executor = LossExecutor({"low": 1.0, "high": 1.0}, weighting=InverseEMA(2, decay=0.5))
        >>> w = torch.nn.Parameter(torch.tensor(1.0))
        >>> for _ in range(2):
        ...     _ = executor({"low": w * 3, "high": w})
        ...     record = executor.step(torch.optim.SGD([w], lr=0.1))
        >>> {name: round(weight, 3) for name, weight in record.weights.items()}  # from the first step's losses
        {'low': 0.333, 'high': 1.0}
    """

    sums: Tensor
    counts: Tensor

    def __init__(self, n_terms: int, decay: float = 0.99) -> None:
        super().__init__(n_terms)
        if not 0 <= decay < 1:
            raise ValueError(f"InverseEMA's decay is {decay}: give a number in [0, 1)")
        self.decay = decay
        self.register_buffer("sums", torch.zeros(n_terms, dtype=torch.float64))
        self.register_buffer("counts", torch.zeros(n_terms, dtype=torch.float64))

    def forward(self, losses: Tensor, context: Context) -> Tensor:
        """[K] weights, from the steps before this one."""
        return torch.where(self.counts > 0, inverse_weights(self.sums / self.counts), ones(self.n_terms))

    def saturated(self) -> Tensor:
        """[K] bool, 1/mᵢ clipped."""
        means = self.sums / self.counts
        return (means <= 1 / _GREATEST) | (means >= 1 / _LEAST)

    def after_step(self, losses: Tensor, context: Context) -> None:
        """Take this step's losses into the means of the terms that are there."""
        self.sums, self.counts = averaged(self.sums, self.counts, losses.abs(), self.decay)
