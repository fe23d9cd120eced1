"""EnCodec's balancer: every term gets its share of the gradient at the output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from adaptive_loss.weighting import weightings
from adaptive_loss.weighting.base import Context
from adaptive_loss.weighting.gradient_rule import GradientRule, averaged, far_below, known_norms

_EPS = 1e-12


def balanced_weights(shares: Tensor, averages: Tensor, total: float, limit: float) -> Tensor:
    """wᵢ = pᵢ·R/(nᵢ + 1e−12) (Défossez et al. 2022, sec. 3.4), nᵢ counted as at least maxⱼ nⱼ/limit.

    The floor keeps the ratio of two weights in bounds: a gradient that is rounding noise is not blown up.

    Args:
        shares: p, [K] of the whole gradient.
        averages: n, [K] running means of ‖gᵢ‖.
        total: R, the size of the whole gradient.
        limit: greatest factor by which a short gradient is lengthened more than the longest.

    Example:
        >>> balanced_weights(torch.tensor([0.75, 0.25]), torch.tensor([10.0, 0.1]), 1.0, 1e6)
        tensor([0.0750, 2.5000])
    """
    floored = averages.clamp_min(float(averages.max()) / limit)
    return shares * total / (floored + _EPS)


@weightings.register("encodec")
class EnCodec(GradientRule):
    """Gives term i the share startᵢ/Σstart of a gradient of size R at the output, whatever its own scale.

    wᵢ = (startᵢ/Σⱼ startⱼ)·R/(mean‖gᵢ‖ + 1e−12), with gᵢ the gradient of startᵢ·Lᵢ and a running mean of decay β,
    corrected for its start. The start weights are thus shares of the gradient, not factors of the losses: a weight of
    10 beside one of 1 means ten times the push, in any units.

    Reference: Défossez, Copet, Synnaeve & Adi, "High Fidelity Neural Audio Compression", 2022, sec. 3.4.

    Choose it when losses of different kinds (reconstruction, feature matching, adversarial) meet at one output, and you
    can say how much each should count there. Metrics it logs: the weights. Deviations: the norm is of the whole tap, in
    the paper's code a mean of norms over the batch. A gradient of 0, like one that is not finite, is no evidence: it is
    not averaged, and a term that never had another keeps its weight. An average counts as at least 1/limit of the
    largest. Terms that are absent have no share that step.

    Args:
        n_terms: K.
        total: R.
        decay: β in [0, 1).
        limit: how much more than the longest gradient a shorter one may be lengthened.
        at, every: as for :class:`~adaptive_loss.weighting.gradient_rule.GradientRule`.

    Raises:
        ValueError: R or the limit not positive and finite, or a decay outside [0, 1).

    Example:
        >>> import torch
        >>> from adaptive_loss import LossExecutor
        >>> y = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> executor = LossExecutor({"a": 3.0, "b": 1.0}, weighting="encodec")
        >>> executor({"a": 100 * y[0], "b": y[1]}, tap=y).backward()
        >>> y.grad  # three parts to one
        tensor([0.7500, 0.2500])
    """

    jumps = True  # a term that comes late must not creep there from 1 at the rate limit
    sums: Tensor
    counts: Tensor

    def __init__(
        self,
        n_terms: int,
        total: float = 1.0,
        decay: float = 0.999,
        limit: float = 1e6,
        *,
        at: Tensor | Sequence[Tensor] | None = None,
        every: int = 1,
    ) -> None:
        super().__init__(n_terms, at=at, every=every)
        if not (0 < total < float("inf") and 1 <= limit < float("inf") and 0 <= decay < 1):
            raise ValueError(
                f"EnCodec got total={total}, decay={decay}, limit={limit}: "
                "give a positive total, a decay in [0, 1) and a limit of at least 1"
            )
        self.total, self.decay, self.limit = total, decay, limit
        self.register_buffer("sums", torch.zeros(n_terms, dtype=torch.float64))
        self.register_buffer("counts", torch.zeros(n_terms, dtype=torch.float64))

    def saturated(self) -> Tensor:
        """[K] bool, mean‖gᵢ‖ at or below 1/limit of the longest."""
        return far_below(self.sums / self.counts, self.limit)

    def observe(self, losses: Tensor, context: Context) -> Mapping[str, Tensor]:
        """Average this step's norms and balance the terms that are there."""
        norms = known_norms(context)
        sums, counts = averaged(self.sums, self.counts, torch.where(norms > 0, norms, torch.nan), self.decay)
        there = context.present & (counts > 0)
        if not there.any():
            return {}
        held, shares = self.held.clone(), context.start / context.start[context.present].sum()
        held[there] = balanced_weights(shares[there], (sums / counts)[there], self.total, self.limit)
        return {"held": held, "sums": sums, "counts": counts}
