"""Gradient-similarity gate: an auxiliary takes part while it agrees with the base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from adaptive_loss.weighting import weightings
from adaptive_loss.weighting.base import Context
from adaptive_loss.weighting.gradient_rule import AgainstBase, known_norms


def gate(cosines: Tensor, smooth: bool) -> Tensor:
    """1 where cos(gᵢ, g_base) > 0, else 0; or max(0, cos) itself (Du et al. 2018, sec. 3). [K] → [K].

    Example:
        >>> gate(torch.tensor([0.5, -0.5]), smooth=False), gate(torch.tensor([0.5, -0.5]), smooth=True)
        (tensor([1., 0.]), tensor([0.5000, 0.0000]))
    """
    return cosines.clamp_min(0) if smooth else (cosines > 0).to(cosines.dtype)


@weightings.register("cosine_gate")
class CosineGate(AgainstBase):
    """Lets an auxiliary take part only while cos(gᵢ, g_base) > 0, or by that cosine: wᵢ = 1[cos > 0] or max(0, cos).

    gᵢ is the gradient of startᵢ·Lᵢ at the tap. To first order no auxiliary then raises the base term's loss.

    Reference: Du, Czarnecki, Jayakumar, Farajtabar, Pascanu & Lakshminarayanan, "Adapting Auxiliary Losses Using
    Gradient Similarity", 2018.

    Choose it when one term is what you want and the others are there to help it, but may stop helping. Metrics it logs:
    the weights. Deviations: where the base is absent, or its gradient is 0, the gates stay as they are.

    Args:
        n_terms: K.
        smooth: weigh by the cosine itself.
        only: names of the terms to gate; None for every auxiliary.
        at, every: as for :class:`~adaptive_loss.weighting.gradient_rule.GradientRule`.

    Example:
        >>> import torch
        >>> from adaptive_loss import LossExecutor
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> executor = LossExecutor({"task": 1.0, "helps": 1.0, "harms": 1.0}, base="task", weighting="cosine_gate")
        >>> total = executor({"task": w[0], "helps": w.sum(), "harms": w[1] - w[0]}, tap=w)
        >>> {name: round(weight, 6) for name, weight in executor.weights.items()}
        {'task': 1.0, 'helps': 1.0, 'harms': 0.0}
    """

    jumps = True

    def __init__(
        self,
        n_terms: int,
        smooth: bool = False,
        *,
        only: Sequence[str] | None = None,
        at: Tensor | Sequence[Tensor] | None = None,
        every: int = 1,
    ) -> None:
        super().__init__(n_terms, only=only, at=at, every=every)
        self.smooth = smooth

    def observe(self, losses: Tensor, context: Context) -> Mapping[str, Tensor]:
        """The gates of the auxiliaries that are there."""
        assert context.gradients is not None
        norms, base = known_norms(context), self.base()
        if not norms[base] > 0:
            return {}
        gates = gate(context.gradients.cosines[base], self.smooth)
        return {"held": torch.where(self.weighed & ~torch.isnan(norms), gates, self.held)}
