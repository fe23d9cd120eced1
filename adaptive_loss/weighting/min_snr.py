"""Min-SNR-γ weighting of noise levels."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from adaptive_loss.weighting import weightings
from adaptive_loss.weighting.noise_levels import NoiseLevels, Prediction, checked, min_snr


@weightings.register("min_snr")
class MinSNR(NoiseLevels):
    """Weighs K noise levels by min(SNR, γ)/SNR (a model of ε), min(SNR, γ) (of x₀) or min(SNR, γ)/(SNR + 1) (of v).

    Levels with little noise, whose squared error of ε is hard and whose picture is nearly done, are held back.

    Reference: Hang et al., "Efficient Diffusion Training via Min-SNR Weighting Strategy", ICCV 2023.

    Choose it when a diffusion model predicts ε, x₀ or v and converges slowly. For a loss a sample, multiply by
    :func:`~adaptive_loss.weighting.noise_levels.min_snr`. Metrics it logs: the weights. Deviations: one level stands
    for its whole bucket.

    Args:
        n_terms: K.
        levels: K signal-to-noise ratios, one a term.
        gamma: γ.
        prediction: "epsilon", "x0" or "v".

    Example:
        >>> import torch
        >>> from adaptive_loss import LossExecutor
        >>> from adaptive_loss.weighting.min_snr import MinSNR
        >>> executor = LossExecutor({"noisy": 1.0, "clear": 1.0}, weighting=MinSNR(2, levels=[0.5, 20.0]))
        >>> p = torch.nn.Parameter(torch.tensor(1.0))
        >>> executor({"noisy": p**2, "clear": p**2}).item()
        1.25
    """

    def __init__(
        self,
        n_terms: int,
        levels: Sequence[float] | Tensor | None = None,
        gamma: float = 5.0,
        prediction: Prediction = "epsilon",
    ) -> None:
        super().__init__(n_terms, levels)
        if not gamma > 0:
            raise ValueError(f"MinSNR's gamma is {gamma}: give a positive number")
        self.gamma = gamma
        self.prediction: Prediction = checked(prediction)

    def weigh(self, levels: Tensor) -> Tensor:
        """Min-SNR-γ."""
        return min_snr(levels, self.gamma, self.prediction)
