"""GradNorm: gradients of the same size, greater for terms that train slowly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from adaptive_loss.weighting import weightings
from adaptive_loss.weighting.base import Context
from adaptive_loss.weighting.gradient_rule import GradientRule, known_norms

_LEAST = 1e-3
_BETAS, _EPS = (0.9, 0.999), 1e-8


def training_rates(losses: Tensor, first: Tensor) -> Tensor:
    """rᵢ = (Lᵢ/Lᵢ(0)) / meanⱼ(Lⱼ/Lⱼ(0)), above 1 where a term trains slowly (Chen et al. 2018, sec. 3.1).

    Args:
        losses: [K] Lᵢ; below 0 it counts as 0.
        first: [K] Lᵢ(0); where it is not above 0 the ratio cannot be told and counts as 1.

    Example:
        >>> training_rates(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 1.0]))
        tensor([0.5000, 1.5000])
    """
    ratio = torch.where(first > 0, losses.clamp_min(0) / first, 1.0).clamp_max(torch.finfo(losses.dtype).max ** 0.5)
    return ratio / ratio.mean() if ratio.any() else torch.ones_like(ratio)


def gradnorm_gradient(weights: Tensor, norms: Tensor, rates: Tensor, alpha: float) -> Tensor:
    """∂/∂wᵢ Σⱼ |wⱼnⱼ − Ḡ·rⱼ^α| = nᵢ·sign(wᵢnᵢ − Ḡ·rᵢ^α), the target held constant (Chen et al. 2018, eq. 2).

    ‖wᵢgᵢ‖ is wᵢ‖gᵢ‖, so that no second-order graph is needed.

    Args:
        weights: w, [K].
        norms: n, [K] ‖gᵢ‖.
        rates: r, [K].
        alpha: α; Ḡ is the mean of wⱼnⱼ.
    """
    weighted = weights * norms
    return norms * torch.sign(weighted - weighted.mean() * rates**alpha)


def adam_step(gradient: Tensor, mean: Tensor, square: Tensor, steps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Adam's direction m̂/(√v̂ + ε) (Kingma & Ba 2015) and its new moments; ``steps`` counts this one. All [K]."""
    mean = _BETAS[0] * mean + (1 - _BETAS[0]) * gradient
    square = _BETAS[1] * square + (1 - _BETAS[1]) * gradient**2
    corrected = (square / (1 - _BETAS[1] ** steps)).sqrt()
    return mean / (1 - _BETAS[0] ** steps) / (corrected + _EPS), mean, square


def renormalised(weights: Tensor, total: Tensor) -> Tensor:
    """w, at least 1e−3 each, scaled to sum to ``total``. [K] → [K]."""
    weights = weights.clamp_min(_LEAST)
    return weights * (total / weights.sum())


@weightings.register("gradnorm")
class GradNorm(GradientRule):
    """Moves w so that every ‖wᵢgᵢ‖ nears Ḡ·rᵢ^α: terms push equally hard, those that train slowly harder; Σw = K.

    gᵢ is the gradient of startᵢ·Lᵢ at the tap, Ḡ the mean of ‖wᵢgᵢ‖, rᵢ the term's relative inverse training rate.
    Each refresh is one step of Adam (or SGD) on w from sign(‖wᵢgᵢ‖ − Ḡ·rᵢ^α)·‖gᵢ‖; as in the paper, the weights it
    gives are used from the next step on.

    Reference: Chen, Badrinarayanan, Lee & Rabinovich, "GradNorm: Gradient Normalization for Adaptive Loss Balancing in
    Deep Multitask Networks", ICML 2018.

    Choose it when several tasks share a trunk, train at different speeds, and should finish together; the tap is the
    trunk's last layer. Metrics it logs: the weights. Deviations: w is kept at 1e−3 or more, the paper does not say how
    it stays positive. A term that is absent keeps its weight and its moments, and the others keep their sum. A ratio
    that cannot be told (a first loss not above 0) counts as 1.

    Args:
        n_terms: K.
        alpha: α, 1.5 in the paper; greater pulls slow terms up harder, 0 makes all gradients equal.
        rate: learning rate of w, .025 in the paper.
        optimizer: "adam" or "sgd".
        at, every: as for :class:`~adaptive_loss.weighting.gradient_rule.GradientRule`.

    Raises:
        ValueError: a rate that is not positive, an α that is negative, or another optimizer.

    Example:
        >>> import torch
        >>> from adaptive_loss import LossExecutor
        >>> from adaptive_loss.weighting.gradnorm import GradNorm
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> executor = LossExecutor({"a": 1.0, "b": 1.0}, weighting=GradNorm(2, at=w))
        >>> optimizer = torch.optim.SGD([w], lr=0.0)
        >>> for _ in range(2):
        ...     executor({"a": 10 * w[0], "b": w[1]}).backward()
        ...     record = executor.step(optimizer)
        >>> {name: round(weight, 3) for name, weight in record.weights.items()}
        {'a': 0.975, 'b': 1.025}
    """

    first: Tensor
    mean: Tensor
    square: Tensor
    steps: Tensor

    def __init__(
        self,
        n_terms: int,
        alpha: float = 1.5,
        rate: float = 0.025,
        optimizer: str = "adam",
        *,
        at: Tensor | Sequence[Tensor] | None = None,
        every: int = 1,
    ) -> None:
        super().__init__(n_terms, at=at, every=every)
        if not (0 < rate < float("inf") and 0 <= alpha < float("inf")):
            raise ValueError(
                f"GradNorm got rate={rate}, alpha={alpha}: give a positive rate and an alpha of at least 0"
            )
        if optimizer not in ("adam", "sgd"):
            raise ValueError(f"GradNorm's optimizer is {optimizer!r}: give 'adam' or 'sgd'")
        self.alpha, self.rate, self.optimizer = alpha, rate, optimizer
        self.register_buffer("first", torch.full((n_terms,), torch.nan, dtype=torch.float64))
        for name in ("mean", "square", "steps"):
            self.register_buffer(name, torch.zeros(n_terms, dtype=torch.float64))

    def forward(self, losses: Tensor, context: Context) -> Tensor:
        """[K] weights, moved by the steps before this one."""
        super().forward(losses, context)
        return self.held

    def saturated(self) -> Tensor:
        """[K] bool, wᵢ at the least it may be, but for the last rescaling."""
        return self.held <= 1.1 * _LEAST

    def observe(self, losses: Tensor, context: Context) -> Mapping[str, Tensor]:
        """One step of w's optimizer on the terms that are there."""
        norms = known_norms(context)
        known = ~torch.isnan(norms)
        if not known.any():
            return {}
        first = torch.where(known & torch.isnan(self.first), losses, self.first)
        held, mean, square = self.held.clone(), self.mean.clone(), self.square.clone()
        rates = training_rates(losses[known], first[known])
        step = gradient = gradnorm_gradient(held[known], norms[known], rates, self.alpha)
        steps = self.steps + known
        if self.optimizer == "adam":
            step, mean[known], square[known] = adam_step(gradient, mean[known], square[known], steps[known])
        held[known] = renormalised(held[known] - self.rate * step, held[known].sum())
        return {"held": held, "first": first, "mean": mean, "square": square, "steps": steps}
