"""Dual-balancing multi-task learning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from adaptive_loss.weighting import weightings
from adaptive_loss.weighting.base import Context
from adaptive_loss.weighting.gradient_rule import GradientRule, averaged, far_below, known_norms

_EPS = 1e-8


def max_norm_weights(losses: Tensor, averages: Tensor, limit: float) -> Tensor:
    """wᵢ = (maxⱼ nⱼ/nᵢ)/(Lᵢ + 1e−8): log losses, gradients lengthened to the longest (Lin et al. 2023).

    Args:
        losses: [K] Lᵢ > 0; ∇log(Lᵢ + 1e−8) is ∇Lᵢ/(Lᵢ + 1e−8).
        averages: n, [K] running means of ‖∇log(Lᵢ + 1e−8)‖ > 0.
        limit: bound of maxⱼ nⱼ/nᵢ.

    Example:
        >>> max_norm_weights(torch.tensor([2.0, 0.5]), torch.tensor([1.0, 4.0]), 1e6)
        tensor([2., 2.])
    """
    return (averages.max() / averages).clamp_max(limit) / (losses + _EPS)


@weightings.register("db_mtl")
class DBMTL(GradientRule):
    """Balances losses by their logarithms and gradients by the longest: d = Σᵢ (max‖ĝ‖/‖ĝᵢ‖)·∇log(Lᵢ + 1e−8).

    As weights of startᵢ·Lᵢ: wᵢ = (maxⱼ nⱼ/nᵢ)/(startᵢ·Lᵢ + 1e−8), nᵢ a running mean of ‖∇log(startᵢ·Lᵢ + 1e−8)‖ with
    decay β, corrected for its start.

    Reference: Lin, Jiang, Ye, Zhang & Chen, "Dual-Balancing for Multi-Task Learning", 2023.

    Choose it when positive losses in units that cannot be compared should count the same, by value and by gradient.
    Metrics it logs: the weights. Deviations: the paper averages the gradients and adds up the averages; K weights can
    only average their norms, so today's gradients are added up. The ratio of norms is bounded by ``limit``. A term
    without logarithm (a loss not above 0) or with a gradient of 0 is left out and keeps its weight. Between refreshes
    the weights hold, 1/Lᵢ included.

    Args:
        n_terms: K.
        decay: β in [0, 1).
        limit: bound of maxⱼ nⱼ/nᵢ.
        at, every: as for :class:`~adaptive_loss.weighting.gradient_rule.GradientRule`.

    Raises:
        ValueError: a decay outside [0, 1), or a limit below 1.

    Example:
        >>> import torch
        >>> from adaptive_loss import LossExecutor
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> executor = LossExecutor({"a": 1.0, "b": 1.0}, weighting="db_mtl")
        >>> executor({"a": 100 * w[0] ** 2, "b": w[1]}, tap=w).backward()
        >>> w.grad
        tensor([2., 2.])
    """

    jumps = True  # a term that comes late must not creep there from 1 at the rate limit
    sums: Tensor
    counts: Tensor

    def __init__(
        self,
        n_terms: int,
        decay: float = 0.9,
        limit: float = 1e6,
        *,
        at: Tensor | Sequence[Tensor] | None = None,
        every: int = 1,
    ) -> None:
        super().__init__(n_terms, at=at, every=every)
        if not (0 <= decay < 1 and 1 <= limit < float("inf")):
            raise ValueError(f"DBMTL got decay={decay}, limit={limit}: give a decay in [0, 1), a limit of at least 1")
        self.decay, self.limit = decay, limit
        self.register_buffer("sums", torch.zeros(n_terms, dtype=torch.float64))
        self.register_buffer("counts", torch.zeros(n_terms, dtype=torch.float64))

    def saturated(self) -> Tensor:
        """[K] bool, mean‖gᵢ‖ at or below 1/limit of the longest."""
        return far_below(self.sums / self.counts, self.limit)

    def observe(self, losses: Tensor, context: Context) -> Mapping[str, Tensor]:
        """Average this step's norms and balance the terms that have a logarithm."""
        norms = torch.where(losses > 0, known_norms(context) / (losses + _EPS), torch.nan)
        sums, counts = averaged(self.sums, self.counts, torch.where(norms > 0, norms, torch.nan), self.decay)
        there = (losses > 0) & (counts > 0)
        if not there.any():
            return {}
        held = self.held.clone()
        held[there] = max_norm_weights(losses[there], (sums / counts)[there], self.limit)
        return {"held": held, "sums": sums, "counts": counts}
