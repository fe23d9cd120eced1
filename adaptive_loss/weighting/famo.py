"""Fast adaptive multitask optimization."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.adam import adam

from adaptive_loss.weighting import weightings
from adaptive_loss.weighting.base import Context, Weighting, ones

_EPS = 1e-8


def famo_logs(losses: Tensor, least: Tensor) -> Tensor:
    """log(Lᵢ − bᵢ + 1e−8), NaN where Lᵢ is not above bᵢ. [K], [K] → [K]."""
    above = losses - least
    return torch.where(above > 0, above, torch.nan).add(_EPS).log()


def famo_weights(logs: Tensor, logits: Tensor) -> Tensor:
    """wᵢ = c·zᵢ/Dᵢ with Dᵢ = Lᵢ − bᵢ + 1e−8, z = softmax(ξ), c = 1/Σⱼ(zⱼ/Dⱼ) (Liu et al. 2023, alg. 1).

    These are the derivatives of c·Σᵢ zᵢ log Dᵢ, c and z held; they sum to 1, and are softmax(ξ − log D).

    Args:
        logs: log D, [K].
        logits: ξ, [K].

    Example:
        >>> famo_weights(torch.tensor([1.0, 4.0]).log(), torch.zeros(2))
        tensor([0.8000, 0.2000])
    """
    return torch.softmax(logits - logs, dim=0)


def famo_gradient(fall: Tensor, logits: Tensor) -> Tensor:
    """dᵢ = Σⱼ δⱼ·∂zⱼ/∂ξᵢ = zᵢ(δᵢ − Σⱼ zⱼδⱼ), the direction in which Adam descends on ξ (Liu et al. 2023, alg. 1).

    Args:
        fall: δ, [K] how far each log D fell.
        logits: ξ, [K].
    """
    shares = torch.softmax(logits, dim=0)
    return shares * (fall - (shares * fall).sum())


@weightings.register("famo")
class FAMO(Weighting):
    """Lets all losses fall at one relative rate: wᵢ = c·zᵢ/(Lᵢ − bᵢ + 1e−8), z = softmax(ξ), Σw = 1.

    ξ starts at 0 and is learned by its own Adam from how far each log(Lᵢ − bᵢ) fell: a term that falls fast loses
    weight to one that falls slowly. The units of a term do not matter. ξ is no parameter of the executor: the model's
    optimizer must not touch it.

    Reference: Liu, Feng, Stone & Liu, "FAMO: Fast Adaptive Multitask Optimization", NeurIPS 2023.

    Choose it when many terms in units that cannot be compared should fall together, at the price of loss values alone.
    Metrics it logs: the weights. Deviations: the paper computes the losses again on the same batch after each step, a
    second forward pass; here δ is the change to the next accepted step's losses, which differ by the batch too, so ξ
    moves a step later and on noisier evidence. A term whose loss is not above bᵢ has no logarithm: it is left out that
    step and has weight 1. A term that is absent or off is left out too and its ξ rests; when it comes back, δ is the
    change since it was last there.

    Args:
        n_terms: K.
        least: bᵢ, the losses' lower bounds in their own units: one number, or K.
        rate: Adam's learning rate for ξ, .025 in the paper.
        weight_decay: γ, 1e−3 in the paper.

    Raises:
        ValueError: bounds that are not one or K finite numbers, a rate or decay that is negative or not finite.

    Example:
        >>> import torch
        >>> from adaptive_loss import LossExecutor
        >>> executor = LossExecutor({"a": 1.0, "b": 1.0}, weighting="famo")
        >>> a, b = torch.tensor(1.0, requires_grad=True), torch.tensor(4.0, requires_grad=True)
        >>> round(executor({"a": a, "b": b}).item(), 6)  # 0.8·1 + 0.2·4
        1.6
    """

    jumps = True
    logits: Tensor
    mean: Tensor
    square: Tensor
    steps: Tensor
    last: Tensor

    def __init__(
        self, n_terms: int, least: float | Sequence[float] = 0.0, rate: float = 0.025, weight_decay: float = 1e-3
    ) -> None:
        super().__init__(n_terms)
        bounds = torch.as_tensor(least, dtype=torch.float64)
        if bounds.shape not in ((), (n_terms,)) or not torch.isfinite(bounds).all():
            raise ValueError(f"FAMO's least is {least}: give one finite number, or {n_terms}")
        if not (0 <= rate < float("inf") and 0 <= weight_decay < float("inf")):
            raise ValueError(f"FAMO got rate={rate}, weight_decay={weight_decay}: give finite numbers of at least 0")
        self.least, self.rate, self.weight_decay = bounds, rate, weight_decay
        for name in ("logits", "mean", "square"):
            self.register_buffer(name, torch.zeros(n_terms, dtype=torch.float64))
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("last", torch.full((n_terms,), torch.nan, dtype=torch.float64))

    def forward(self, losses: Tensor, context: Context) -> Tensor:
        """[K] weights from this step's losses."""
        logs, weights = famo_logs(losses, self.least * context.start), ones(self.n_terms)
        usable = ~torch.isnan(logs)
        weights[usable] = famo_weights(logs[usable], self.logits[usable])
        return weights

    def after_step(self, losses: Tensor, context: Context) -> None:
        """Move ξ by how far the logarithms fell since the terms were last there."""
        logs = famo_logs(losses, self.least * context.start)
        known = ~torch.isnan(logs) & ~torch.isnan(self.last)
        if known.any():
            self._learn(known, famo_gradient((self.last - logs)[known], self.logits[known]))
        self.last = torch.where(torch.isnan(logs), self.last, logs)

    def _learn(self, known: Tensor, gradient: Tensor) -> None:
        # Adam as a function on copies: an optimizer object would share its state with a saved one, run everybody's
        # step hooks, and move terms that are not there by their momentum.
        logits, mean, square, steps = (*(b[known] for b in (self.logits, self.mean, self.square)), self.steps.clone())
        adam(
            [logits],
            [gradient],
            [mean],
            [square],
            [],
            [steps],
            foreach=False,
            amsgrad=False,
            beta1=0.9,
            beta2=0.999,
            lr=self.rate,
            weight_decay=self.weight_decay,
            eps=1e-8,
            maximize=False,
        )
        self.logits = self.logits.masked_scatter(known, logits)
        self.mean = self.mean.masked_scatter(known, mean)
        self.square = self.square.masked_scatter(known, square)
        self.steps = steps
