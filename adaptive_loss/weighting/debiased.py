"""Debiased-estimation weighting of noise levels."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from adaptive_loss.weighting import weightings
from adaptive_loss.weighting.noise_levels import NoiseLevels, Prediction, checked, debiased


@weightings.register("debiased")
class Debiased(NoiseLevels):
    """Weighs K noise levels by SNR^−½ (a model of ε), times SNR (of x₀) or times SNR/(SNR + 1) (of v).

    An error of ε grows by SNR^−½ into an error of the picture, which the constant weight neglects at high noise.

    Reference: Yu et al., "Debias the Training of Diffusion Models", 2023.

    Choose it when samples of a diffusion model of ε have wrong colours or brightness. For a loss a sample, multiply by
    :func:`~adaptive_loss.weighting.noise_levels.debiased`. Metrics it logs: the weights. Deviations: an SNR counts as
    at least ``floor``, for schedules that end in pure noise; one level stands for its whole bucket.

    Args:
        n_terms: K.
        levels: K signal-to-noise ratios, one a term.
        floor: least SNR.
        prediction: "epsilon", "x0" or "v".

    Example:
        >>> import torch
        >>> from adaptive_loss import LossExecutor
        >>> from adaptive_loss.weighting.debiased import Debiased
        >>> executor = LossExecutor({"noisy": 1.0, "clear": 1.0}, weighting=Debiased(2, levels=[0.25, 4.0]))
        >>> p = torch.nn.Parameter(torch.tensor(1.0))
        >>> executor({"noisy": p**2, "clear": p**2}).item()
        2.5
    """

    def __init__(
        self,
        n_terms: int,
        levels: Sequence[float] | Tensor | None = None,
        floor: float = 1e-6,
        prediction: Prediction = "epsilon",
    ) -> None:
        super().__init__(n_terms, levels)
        if not floor > 0:
            raise ValueError(f"Debiased's floor is {floor}: give a positive SNR")
        self.floor = floor
        self.prediction: Prediction = checked(prediction)

    def weigh(self, levels: Tensor) -> Tensor:
        """SNR^−½."""
        return debiased(levels, self.floor, self.prediction)
