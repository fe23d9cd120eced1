"""SoftAdapt."""

from __future__ import annotations

import torch
from torch import Tensor

from adaptive_loss.weighting import weightings
from adaptive_loss.weighting.base import Context, Weighting, ones

_SMALLEST = 1e-30


def softadapt_weights(slopes: Tensor, beta: float, sizes: Tensor | None = None) -> Tensor:
    """wᵢ ∝ exp(β·sᵢ), or |L̄ᵢ|·exp(β·sᵢ) with sizes; they sum to 1 (Heydari et al. 2019, sec. 3.1.1).

    Args:
        slopes: s, [K] change of each loss a step.
        beta: β; above 0 the terms that fall least weigh most, below 0 those that fall most.
        sizes: |L̄|, [K] sizes of the recent mean losses, for the loss-weighted form.

    Example:
        >>> softadapt_weights(torch.tensor([0.0, 1.0]), 2.0)
        tensor([0.1192, 0.8808])
    """
    logits = beta * slopes
    return torch.softmax(logits if sizes is None else logits + sizes.clamp_min(_SMALLEST).log(), dim=0)


def window_slopes(past: Tensor) -> Tensor:
    """sᵢ = (newest − oldest)/(n − 1) over the n ≤ N values a term has; 0 for fewer than two.

    Args:
        past: [N, K] values, the newest last, NaN where there is none yet.
    """
    counts = (~torch.isnan(past)).sum(0)
    oldest = past.gather(0, (len(past) - counts).clamp_max(len(past) - 1)[None])[0]
    return torch.where(counts > 1, (past[-1] - oldest) / (counts - 1).clamp_min(1), 0.0)


def window_sizes(past: Tensor) -> Tensor:
    """|L̄ᵢ| of the values a term has; one that has none yet counts as the others do on average. [N, K] → [K]."""
    sizes = past.nanmean(0).abs()
    return sizes.nan_to_num(float(sizes.nanmean().nan_to_num(1.0)))


@weightings.register("softadapt")
class SoftAdapt(Weighting):
    """Weights terms by how their losses rose lately: w = softmax(β·s), with L̄ᵢ as a factor if loss-weighted.

    sᵢ is the mean change a step over the last ``span`` steps, L̄ᵢ the mean over the same window; before there are two
    values the slope counts as 0. The weights sum to 1. Slopes have the losses' units: scaling all losses by c is
    scaling β by c.

    Reference: Heydari, Thompson & Mehmood, "SoftAdapt: Techniques for Adaptive Loss Weighting of Neural Networks with
    Multi-Part Loss Functions", arXiv:1912.12355, 2019.

    Choose it when the terms have one unit and those that stall should get more. Metrics it logs: the weights.
    Deviations: the authors' code takes a finite difference of high order at the oldest of its points, every few epochs;
    here it is the mean slope, which noise in the batches does not blow up, every step. A term's history holds the steps
    on which it was there; terms that are absent or off are left out of the softmax and show weight 1. The loss-weighted
    form takes |L̄ᵢ|, else a negative loss would have a negative weight.

    Args:
        n_terms: K.
        beta: β, 0.1 in the authors' code.
        span: steps over which the slope is taken, at least 1.
        loss_weighted: weigh by L̄ᵢ·exp(β·sᵢ) instead of exp(β·sᵢ).

    Raises:
        ValueError: a span below 1 or a β that is not finite.

    Example:
        >>> import torch
        >>> from adaptive_loss import LossExecutor
        >>> executor = LossExecutor({"a": 1.0, "b": 1.0}, weighting="softadapt")
        >>> a, b = torch.tensor(2.0, requires_grad=True), torch.tensor(4.0, requires_grad=True)
        >>> executor({"a": a, "b": b}).item(), executor.weights
        (3.0, {'a': 0.5, 'b': 0.5})
    """

    jumps = True
    past: Tensor

    def __init__(self, n_terms: int, beta: float = 0.1, span: int = 5, loss_weighted: bool = False) -> None:
        super().__init__(n_terms)
        if span < 1 or not abs(beta) < float("inf"):
            raise ValueError(f"SoftAdapt got beta={beta}, span={span}: give a finite beta and a span of at least 1")
        self.beta, self.loss_weighted = beta, loss_weighted
        self.register_buffer("past", torch.full((span + 1, n_terms), torch.nan, dtype=torch.float64))

    def forward(self, losses: Tensor, context: Context) -> Tensor:
        """[K] weights, from the steps before this one."""
        weights, present = ones(self.n_terms), ~torch.isnan(losses)
        past = self.past[:, present]
        sizes = window_sizes(past) if self.loss_weighted else None
        weights[present] = softadapt_weights(window_slopes(past), self.beta, sizes)
        return weights

    def after_step(self, losses: Tensor, context: Context) -> None:
        """Shift this step's losses into the windows of the terms that are there."""
        shifted = torch.cat([self.past[1:], losses[None]])
        self.past = torch.where(torch.isnan(losses), self.past, shifted)
