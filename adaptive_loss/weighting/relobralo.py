"""Relative loss balancing with random lookback."""

from __future__ import annotations

import torch
from torch import Tensor

from adaptive_loss.losses import Terms
from adaptive_loss.seeding import own_generator
from adaptive_loss.weighting import weightings
from adaptive_loss.weighting.base import Context, Weighting, ones

_LARGEST = 1e6
"""Bound of a ratio of losses: beyond it the softmax is all or nothing anyway."""


def relobralo_balance(now: Tensor, then: Tensor, temperature: float) -> Tensor:
    """λ̂(t; t′) = K·softmax(rᵢ/τ) with rᵢ = Lᵢ(t)/Lᵢ(t′) (Bischof & Kraus 2021).

    Args:
        now, then: [K] losses of step t and of an earlier step t′; a ratio that cannot be told (Lᵢ(t′) is 0 or NaN)
            counts as 1, neither fallen nor risen.
        temperature: τ > 0; greater is more even.

    Example:
        >>> relobralo_balance(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 0.0]), 1.0)  # r = (½, 1)
        tensor([0.7551, 1.2449])
    """
    ratios = (now / then).nan_to_num(1.0, 1.0, 1.0).clamp(-_LARGEST, _LARGEST)
    return len(now) * torch.softmax(ratios / temperature, dim=0)


def relobralo_step(last: Tensor, to_first: Tensor, to_last: Tensor, keep: float, alpha: float) -> Tensor:
    """λ(t) = α(ρλ(t−1) + (1−ρ)λ̂(t; 0)) + (1−α)λ̂(t; t−1) (Bischof & Kraus 2021).

    Args:
        last: λ(t−1), [K].
        to_first, to_last: λ̂(t; 0) and λ̂(t; t−1), [K].
        keep: ρ, 1 or 0.
        alpha: α in [0, 1].
    """
    return alpha * (keep * last + (1 - keep) * to_first) + (1 - alpha) * to_last


@weightings.register("relobralo")
class ReLoBRaLo(Weighting):
    """Weights terms by how little they fell, since the last step and, now and then, since the first.

    λ(t) = α(ρλ(t−1) + (1−ρ)λ̂(t; 0)) + (1−α)λ̂(t; t−1) with λ̂(t; t′) = K·softmax(Lᵢ(t)/(τ·Lᵢ(t′))) and ρ ~ Bernoulli(β);
    λ(0) = 1. The weights sum to K; the ratios do not depend on the units of a term.

    Reference: Bischof & Kraus, "Multi-Objective Loss Balancing for Physics-Informed Deep Learning", arXiv:2110.09813,
    2021.

    Choose it when the terms of a physics-informed network, or others in units that cannot be compared, should fall at
    one relative rate. Metrics it logs: the weights. Deviations: a ratio to a loss of 0 counts as 1, where public code
    gives inf; a term that comes late is compared with the first step on which it was there. A term that is absent or
    off is left out of the softmax and of K and keeps its λ. ρ is drawn for the next step when a step is accepted, from
    the rule's own generator, the same on every rank. Losses should keep their sign: a negative one that falls grows in
    size, and counts as risen.

    Args:
        n_terms: K.
        alpha: α in [0, 1], how slowly λ moves: .95 in NVIDIA's code, .999 in the author's.
        beta: β in [0, 1], the probability to keep λ(t−1) rather than to look back to the first step.
        temperature: τ.

    Raises:
        ValueError: α or β outside [0, 1], a temperature that is not positive.

    Example:
        >>> import torch
        >>> from adaptive_loss import LossExecutor
        >>> executor = LossExecutor({"a": 1.0, "b": 1.0}, weighting="relobralo")
        >>> a, b = torch.tensor(2.0, requires_grad=True), torch.tensor(4.0, requires_grad=True)
        >>> executor({"a": a, "b": b}).item()
        6.0
    """

    jumps = True
    balance: Tensor
    first: Tensor
    last: Tensor
    random: Tensor
    keep: Tensor

    def __init__(self, n_terms: int, alpha: float = 0.95, beta: float = 0.99, temperature: float = 1.0) -> None:
        super().__init__(n_terms)
        if not (0 <= alpha <= 1 and 0 <= beta <= 1 and temperature > 0):
            raise ValueError(
                f"ReLoBRaLo got alpha={alpha}, beta={beta}, temperature={temperature}: "
                "give alpha and beta in [0, 1] and a positive temperature"
            )
        self.alpha, self.beta, self.temperature = alpha, beta, temperature
        self.register_buffer("balance", ones(n_terms))
        self.register_buffer("first", torch.full((n_terms,), torch.nan, dtype=torch.float64))
        self.register_buffer("last", torch.full((n_terms,), torch.nan, dtype=torch.float64))
        self.register_buffer("random", torch.empty(0, dtype=torch.uint8))
        self.register_buffer("keep", torch.empty((), dtype=torch.float64))
        self._draw_next(own_generator(0, "relobralo"))

    def bind(self, terms: Terms, seed: int) -> None:
        """Seed the draws, and draw for the first step."""
        super().bind(terms, seed)
        self._draw_next(own_generator(seed, "relobralo"))

    def forward(self, losses: Tensor, context: Context) -> Tensor:
        """[K] λ(t) from this step's losses."""
        if torch.isnan(self.first).all():
            return self.balance
        weights, present = self.balance.clone(), ~torch.isnan(losses)
        now, first, last = losses[present], self.first[present], self.last[present]
        to_first = relobralo_balance(now, first, self.temperature)
        to_last = relobralo_balance(now, last, self.temperature)
        weights[present] = relobralo_step(weights[present], to_first, to_last, float(self.keep), self.alpha)
        return weights

    def after_step(self, losses: Tensor, context: Context) -> None:
        """Keep λ(t) and the losses, and draw the next ρ."""
        self.balance = self.forward(losses, context)
        self.last = torch.where(torch.isnan(losses), self.last, losses)
        self.first = torch.where(torch.isnan(self.first), losses, self.first)
        generator = torch.Generator()
        generator.set_state(self.random)
        self._draw_next(generator)

    def _draw_next(self, generator: torch.Generator) -> None:
        self.keep = torch.bernoulli(torch.tensor(self.beta, dtype=torch.float64), generator=generator)
        self.random = generator.get_state()
