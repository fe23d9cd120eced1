"""Learning-rate annealing for physics-informed networks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from adaptive_loss.gradients import Gradient, TermGradients
from adaptive_loss.parallel import greatest, summed
from adaptive_loss.weighting import weightings
from adaptive_loss.weighting.base import Context
from adaptive_loss.weighting.gradient_rule import AgainstBase


def entry_sizes(gradients: TermGradients) -> tuple[Tensor, Tensor]:
    """max|gᵢ| and mean|gᵢ| over the tap's entries, on all ranks, [K] each; one transfer to the host.

    A tensor of the tap that a term does not reach counts as zeros; sizes are taken in float32 at least.
    """
    at, shares, group = gradients.at, gradients.shares, gradients.group
    count = sum(tensor.numel() * share for tensor, share in zip(at, shares, strict=True))
    found = torch.stack([_sizes(parts, shares, at[0].device) for parts in gradients.raw]).to("cpu", torch.float64)
    sums = summed(torch.cat([found[:, 1], torch.tensor([count], dtype=torch.float64)]), group)
    scale = gradients.scale.abs()
    return greatest(found[:, 0], group) * scale, sums[:-1] / sums[-1].clamp_min(1) * scale


def _sizes(parts: Gradient, shares: Sequence[float], device: torch.device) -> Tensor:
    """[2] greatest entry and sum of all entries that this rank answers for, in size."""
    there = [(part, share) for part, share in zip(parts, shares, strict=True) if part is not None and part.numel()]
    if not there:
        return torch.zeros(2, device=device)
    sizes = [(part.abs().to(torch.promote_types(part.dtype, torch.float32)), share) for part, share in there]
    return torch.stack(
        [
            torch.stack([size.amax().to(device) for size, _ in sizes]).amax(),
            torch.stack([size.sum().to(device) * share for size, share in sizes]).sum(),
        ]
    )


def annealed(weights: Tensor, base: Tensor, means: Tensor, alpha: float, limit: float) -> Tensor:
    """λᵢ ← (1−α)λᵢ + α·min(b/mᵢ, limit) (Wang, Teng & Perdikaris 2021, alg. 1). [K] → [K].

    Args:
        weights: λ, [K].
        base: b, max|g_base| or mean|g_base|, a scalar.
        means: m, [K] mean|gᵢ| > 0.
        alpha: α.
        limit: bound of the ratio.

    Example:
        >>> annealed(torch.ones(2), torch.tensor(3.0), torch.tensor([1.0, 0.1]), 0.1, 1e4)
        tensor([1.2000, 3.9000])
    """
    return (1 - alpha) * weights + alpha * (base / means).clamp_max(limit)


@weightings.register("lr_annealing")
class LRAnnealing(AgainstBase):
    """Moves λᵢ towards max|g_base|/mean|gᵢ|, so that a stiff base term does not drown the others.

    λᵢ ← (1−α)·λᵢ + α·max|g_base|/mean|gᵢ| with gᵢ the gradient of startᵢ·Lᵢ, from λ = 1 on; "mean" takes
    mean|g_base| above instead.

    Reference: Wang, Teng & Perdikaris, "Understanding and Mitigating Gradient Flow Pathologies in Physics-Informed
    Neural Networks", SIAM Journal on Scientific Computing 2021, alg. 1.

    Choose it when a differential equation's residual is the base, and boundary, initial or data terms are fitted too
    slowly beside it; the tap is all parameters of the network, every 10 steps or so. Metrics it logs: the weights.
    Deviations: the ratio is bounded by ``limit``, and a term with a gradient of 0, or all terms where the base is
    absent or has none, keep their λ. The paper's text gives α = .9 where its code keeps .9 of the old λ, which is .1
    here.

    Args:
        n_terms: K.
        alpha: α in (0, 1]; None for .1 (Wang) with "max" and .01 (NVIDIA) with "mean".
        statistic: of the base's gradient, "max" or "mean".
        limit: bound of the ratio.
        only: names of the terms to weigh; None for every auxiliary.
        at, every: as for :class:`~adaptive_loss.weighting.gradient_rule.GradientRule`.

    Raises:
        ValueError: α outside (0, 1], another statistic, or a limit that is not positive and finite.

    Example:
        >>> import torch
        >>> from adaptive_loss import LossExecutor
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> executor = LossExecutor({"residual": 1.0, "boundary": 1.0}, base="residual", weighting="lr_annealing")
        >>> total = executor({"residual": 8 * w[0], "boundary": w[1]}, tap=w)
        >>> {name: round(weight, 3) for name, weight in executor.weights.items()}  # .9·1 + .1·8/.5
        {'residual': 1.0, 'boundary': 2.5}
    """

    def __init__(
        self,
        n_terms: int,
        alpha: float | None = None,
        statistic: str = "max",
        limit: float = 1e4,
        *,
        only: Sequence[str] | None = None,
        at: Tensor | Sequence[Tensor] | None = None,
        every: int = 1,
    ) -> None:
        super().__init__(n_terms, only=only, at=at, every=every)
        if statistic not in ("max", "mean"):
            raise ValueError(f"LRAnnealing's statistic is {statistic!r}: give 'max' or 'mean'")
        self.alpha = {"max": 0.1, "mean": 0.01}[statistic] if alpha is None else alpha
        if not (0 < self.alpha <= 1 and 0 < limit < float("inf")):
            raise ValueError(f"LRAnnealing got alpha={alpha}, limit={limit}: give an alpha in (0, 1], a positive limit")
        self.statistic, self.limit = statistic, limit

    def saturated(self) -> Tensor:
        """[K] bool, λᵢ within 1% of the limit that it is drawn to."""
        return self.held >= 0.99 * self.limit

    def observe(self, losses: Tensor, context: Context) -> Mapping[str, Tensor]:
        """Move λ of the auxiliaries that are there."""
        assert context.gradients is not None
        greatest, means = entry_sizes(context.gradients)
        base = (greatest if self.statistic == "max" else means)[self.base()]
        known = self.weighed & (means > 0) & torch.isfinite(means)
        if not (base > 0 and torch.isfinite(base)):
            return {}
        return {"held": torch.where(known, annealed(self.held, base, means, self.alpha, self.limit), self.held)}
