"""Smooth Tchebycheff scalarization."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from adaptive_loss.weighting import weightings
from adaptive_loss.weighting.base import Context, Weighting, ones

_SMALLEST = 1e-20


def stch_weights(above: Tensor, preference: Tensor, mu: float) -> Tensor:
    """wᵢ = ∂/∂Lᵢ of μ·log Σⱼ exp(λⱼ(Lⱼ − zⱼ*)/μ) = λᵢ·softmax(λ(L − z*)/μ)ᵢ (Lin et al. 2024).

    Args:
        above: L − z*, [K] losses above the ideal point.
        preference: λ, [K].
        mu: μ > 0; the smaller, the more the largest term alone counts.

    Example:
        >>> stch_weights(torch.tensor([1.0, 3.0]), torch.tensor([0.5, 0.5]), 1.0)  # softmax(½, 3/2)/2
        tensor([0.1345, 0.3655])
    """
    return preference * torch.softmax(preference * above / mu, dim=0)


def stch_log_weights(losses: Tensor, nadir: Tensor, mu: float) -> Tensor:
    """wᵢ = ∂/∂Lᵢ of K·μ·log Σⱼ exp(log(Lⱼ/nⱼ)/μ) = K·softmax(log(L/n)/μ)ᵢ/Lᵢ, so that Σᵢ wᵢLᵢ = K.

    Args:
        losses: L, [K] positive.
        nadir: n, [K] positive: the losses' sizes after warm-up.
        mu: μ > 0.

    Example:
        >>> stch_log_weights(torch.tensor([1.0, 6.0]), torch.tensor([1.0, 2.0]), 1.0)  # 2·(¼, ¾)/L
        tensor([0.5000, 0.2500])
    """
    held = losses.clamp_min(_SMALLEST)
    logs = held.log() - nadir.clamp_min(_SMALLEST).log()
    return len(held) * torch.softmax(logs / mu, dim=0) / held


@weightings.register("stch")
class STCH(Weighting):
    """A smooth maximum of the terms: the worst one, as its preference counts it, gets most of the gradient.

    Two forms. Linear: μ·log Σᵢ exp(λᵢ(Lᵢ − zᵢ*)/μ), with λ the preference, scaled to sum to 1, and z* the ideal point.
    Logarithmic: K·μ·log Σᵢ exp(log(Lᵢ/nᵢ)/μ), with n the mean losses of the epoch after ``warm_up`` epochs; until then
    Σᵢ log Lᵢ, so wᵢ = 1/Lᵢ. The weights are the exact derivatives; the total Σᵢ wᵢLᵢ is not the scalarization's value.
    The linear weights sum to at most the greatest λ, 1/K by default; the logarithmic total is always K.

    Reference: Lin et al., "Smooth Tchebycheff Scalarization for Multi-Objective Optimization", ICML 2024; the
    logarithmic form is that of its multi-task code.

    Choose it when no term may be left behind: the linear form where the terms have one unit, the logarithmic one where
    they are positive and have not. Metrics it logs: the weights. Deviations: the preference is scaled to sum to 1 over
    the terms that are there; those absent or off are left out and show weight 1. A loss that is not positive has no
    logarithm: it is left out of the logarithmic form that step and has weight 1. A term without a positive mean in the
    nadir's epoch stays at 1/Lᵢ and takes its nadir from the first epoch that has one.

    Args:
        n_terms: K.
        log: the logarithmic form; it needs ``executor.end_epoch()`` unless the nadir is given.
        mu: μ; the paper tries .01 to 1.
        preference: λ, K positive numbers (linear form); equal by default.
        ideal: z*, K numbers in the losses' own units (linear form); 0 by default.
        nadir: n, K positive numbers in the losses' own units (logarithmic form); by default it is measured.
        warm_up: epochs before the one that measures the nadir (logarithmic form), 4 in the authors' code.

    Raises:
        ValueError: a μ that is not positive, vectors of another length or sign or of the other form.

    Example:
        >>> import torch
        >>> from adaptive_loss import LossExecutor
        >>> from adaptive_loss.weighting.stch import STCH
        >>> a, b = torch.tensor(1.0, requires_grad=True), torch.tensor(6.0, requires_grad=True)
        >>> executor = LossExecutor({"a": 1.0, "b": 1.0}, weighting=STCH(2, log=True, nadir=[1.0, 2.0]))
        >>> round(executor({"a": a, "b": b}).item(), 6)
        2.0
    """

    jumps = True
    nadir: Tensor
    total: Tensor
    count: Tensor
    epochs: Tensor

    def __init__(
        self,
        n_terms: int,
        log: bool = False,
        mu: float = 1.0,
        preference: Sequence[float] | None = None,
        ideal: Sequence[float] | None = None,
        nadir: Sequence[float] | None = None,
        warm_up: int = 4,
    ) -> None:
        super().__init__(n_terms)
        if not 0 < mu < float("inf") or warm_up < 0:
            raise ValueError(f"STCH got mu={mu}, warm_up={warm_up}: give a positive mu and a warm-up of at least 0")
        if (log and (preference is not None or ideal is not None)) or (not log and nadir is not None):
            raise ValueError("STCH's preference and ideal belong to the linear form, its nadir to log=True")
        self.log, self.mu, self.warm_up = log, mu, warm_up
        self.preference = _vector("preference", preference, ones(n_terms), positive=True)
        self.ideal = _vector("ideal", ideal, torch.zeros_like(self.preference))
        self.given = None if nadir is None else _vector("nadir", nadir, self.ideal, positive=True)
        if log and nadir is None:
            self.needs = ("epochs",)
        self.register_buffer("nadir", torch.full((n_terms,), torch.nan, dtype=torch.float64))
        self.register_buffer("total", torch.zeros(n_terms, dtype=torch.float64))
        self.register_buffer("count", torch.zeros(n_terms, dtype=torch.float64))
        self.register_buffer("epochs", torch.zeros((), dtype=torch.int64))

    def forward(self, losses: Tensor, context: Context) -> Tensor:
        """[K] weights from this step's losses."""
        if self.log:
            return self._logarithmic(losses, self.nadir if self.given is None else self.given * context.start)
        weights, present = ones(self.n_terms), ~torch.isnan(losses)
        preference = self.preference[present]
        above = (losses - self.ideal * context.start)[present]
        weights[present] = stch_weights(above, preference / preference.sum(), self.mu)
        return weights

    def _logarithmic(self, losses: Tensor, nadir: Tensor) -> Tensor:
        usable = losses > 0
        weights = torch.where(usable, 1 / losses.clamp_min(_SMALLEST), 1.0)
        known = usable & (nadir > 0)
        weights[known] = stch_log_weights(losses[known], nadir[known], self.mu)
        return weights

    def after_step(self, losses: Tensor, context: Context) -> None:
        """Add this step's losses to the epoch's means, which the nadir is made of."""
        self.total = self.total + losses.nan_to_num(0.0)
        self.count = self.count + ~torch.isnan(losses)

    def end_epoch(self, metrics: Mapping[str, float]) -> None:
        """Measure the nadir where the warm-up is over; an epoch without an accepted step is none."""
        if not self.count.any():
            return
        means = self.total / self.count
        unknown = torch.isnan(self.nadir) & (means > 0) & (self.epochs >= self.warm_up)
        self.nadir = torch.where(unknown, means, self.nadir)
        self.epochs = self.epochs + 1
        self.total = torch.zeros_like(self.total)
        self.count = torch.zeros_like(self.count)


def _vector(name: str, given: Sequence[float] | None, default: Tensor, positive: bool = False) -> Tensor:
    if given is None:
        return default
    values = torch.as_tensor(given, dtype=torch.float64)
    if values.shape != default.shape or not torch.isfinite(values).all() or (positive and (values <= 0).any()):
        raise ValueError(
            f"STCH's {name} is {given}: give {len(default)} {'positive' if positive else 'finite'} numbers"
        )
    return values
