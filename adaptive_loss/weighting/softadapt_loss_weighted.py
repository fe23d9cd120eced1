"""SoftAdapt, loss-weighted, under a name of its own."""

from __future__ import annotations

from adaptive_loss.weighting import weightings
from adaptive_loss.weighting.softadapt import SoftAdapt


@weightings.register("softadapt_loss_weighted")
class SoftAdaptLossWeighted(SoftAdapt):
    """SoftAdapt, loss-weighted: wᵢ ∝ |L̄ᵢ|·exp(β·sᵢ), so that large losses weigh more.

    Reference: Heydari, Thompson & Mehmood, arXiv:1912.12355, 2019, sec. 3.1.1.

    Choose it when the terms have one unit and the largest should come down first. Metrics it logs: the weights.
    Deviations: those of :class:`SoftAdapt`. Until a step is accepted the weights are equal.

    Args:
        n_terms: K.
        beta, span: as for :class:`SoftAdapt`.

    Example:
        >>> from adaptive_loss import LossExecutor
        >>> LossExecutor({"a": 1.0, "b": 1.0}, weighting="softadapt_loss_weighted").weighting.loss_weighted
        True
    """

    def __init__(self, n_terms: int, beta: float = 0.1, span: int = 5) -> None:
        super().__init__(n_terms, beta, span, loss_weighted=True)
