"""Impartial multi-task learning, its loss balance."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from adaptive_loss.weighting import weightings
from adaptive_loss.weighting.base import Context, Weighting


def imtl_l_weights(log_scale: Tensor, bound: float) -> Tensor:
    """wᵢ = exp(sᵢ) with sᵢ held within ±bound (Liu et al. 2021, IMTL-L). [K] → [K]."""
    return log_scale.clamp(-bound, bound).exp()


@weightings.register("imtl_l")
class IMTLL(Weighting):
    """Total = Σᵢ exp(sᵢ)·Lᵢ − sᵢ, the log-scales sᵢ learned with the model from 0 on.

    At the optimum exp(sᵢ) = 1/Lᵢ, so every term adds 1. It is twice uncertainty weighting with s of the other sign.

    Reference: Liu et al., "Towards Impartial Multi-Task Learning", ICLR 2021, the loss balance (IMTL-L).

    Choose it when all losses are positive, in units that cannot be compared, and their weights should move smoothly.
    Give ``executor.parameters()`` to the optimizer, else the sᵢ stay where they start. Metrics it logs: the weights
    exp(sᵢ). Deviations: the paper bounds nothing, and exp(s) overflows where a loss nears 0; here every accepted step
    puts sᵢ back within ±bound, so that it never runs away and can always return. A loss that is 0 or negative has no
    optimum: its weight grows to exp(bound). A term that is absent adds no −sᵢ that step, else its scale would grow
    without evidence.

    Args:
        n_terms: K.
        bound: greatest |sᵢ| in nats; a weight can move by 10^±4 from its start weight by default.

    Raises:
        ValueError: a bound that is not a positive number of at most 80, where exp still is a float32.

    Example:
        >>> from adaptive_loss import LossExecutor
        >>> executor = LossExecutor({"a": 1.0, "b": 1.0}, weighting="imtl_l")
        >>> [tuple(p.shape) for p in executor.parameters()]
        [(2,)]
    """

    def __init__(self, n_terms: int, bound: float = math.log(1e4)) -> None:
        super().__init__(n_terms)
        if not 0 < bound <= 80:
            raise ValueError(f"IMTL-L's bound is {bound}: give a positive number of nats, at most 80")
        self.bound = bound
        self.log_scale = nn.Parameter(torch.zeros(n_terms))

    def forward(self, losses: Tensor, context: Context) -> Tensor:
        """[K] weights, differentiable in s."""
        return imtl_l_weights(self.log_scale, self.bound)

    def penalty(self, context: Context) -> Tensor:
        """−Σ sᵢ over the terms that are there."""
        held = self.log_scale.clamp(-self.bound, self.bound)
        return -held[context.present.to(held.device)].sum()

    def saturated(self) -> Tensor:
        """[K] bool, |sᵢ| at its bound."""
        return self.log_scale.detach().abs() >= self.bound

    def after_step(self, losses: Tensor, context: Context) -> None:
        """Project s back: outside the bound the clamp has no gradient that could bring it home."""
        with torch.no_grad():
            self.log_scale.clamp_(-self.bound, self.bound)
