"""EDM weighting of noise levels."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from adaptive_loss.weighting import weightings
from adaptive_loss.weighting.noise_levels import NoiseLevels, edm


@weightings.register("edm")
class EDM(NoiseLevels):
    """Weighs K noise levels by λ(σ) = (σ² + σd²)/(σ·σd)², for a denoiser D of the picture.

    σ is the noise's standard deviation, σd the data's; with EDM's preconditioning every level's loss starts at about 1.

    Reference: Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", NeurIPS 2022.

    Choose it when the terms are ‖D − y‖² in the pictures' own units. For a loss a sample, multiply by
    :func:`~adaptive_loss.weighting.noise_levels.edm`. Metrics it logs: the weights. Deviations: one level stands for
    its whole bucket; the paper's density of levels, ln σ ~ N(−1.2, 1.2²), is the sampler's business.

    Args:
        n_terms: K.
        levels: K standard deviations σ > 0, one a term.
        sigma_data: σd, 0.5 in the paper.

    Example:
        >>> import torch
        >>> from adaptive_loss import LossExecutor
        >>> from adaptive_loss.weighting.edm import EDM
        >>> executor = LossExecutor({"clear": 1.0, "noisy": 1.0}, weighting=EDM(2, levels=[0.5, 1.0]))
        >>> p = torch.nn.Parameter(torch.tensor(1.0))
        >>> executor({"clear": p**2, "noisy": p**2}).item()
        13.0
    """

    needs = ("noise levels",)
    unit = "standard deviation σ"

    def __init__(self, n_terms: int, levels: Sequence[float] | Tensor | None = None, sigma_data: float = 0.5) -> None:
        super().__init__(n_terms, levels)
        if not sigma_data > 0:
            raise ValueError(f"EDM's sigma_data is {sigma_data}: give the data's standard deviation")
        self.sigma_data = sigma_data

    def weigh(self, levels: Tensor) -> Tensor:
        """λ(σ)."""
        return edm(levels, self.sigma_data)
