"""P2 weighting of noise levels."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from adaptive_loss.weighting import weightings
from adaptive_loss.weighting.noise_levels import NoiseLevels, Prediction, checked, p2


@weightings.register("p2")
class P2(NoiseLevels):
    """Weighs K noise levels by (k + SNR)^−γ (a model of ε), times SNR (of x₀) or times SNR/(SNR + 1) (of v).

    Levels where only imperceptible detail is left weigh little.

    Reference: Choi et al., "Perception Prioritized Training of Diffusion Models", CVPR 2022.

    Choose it when a diffusion model spends itself on detail nobody sees. For a loss a sample, multiply by
    :func:`~adaptive_loss.weighting.noise_levels.p2`. Metrics it logs: the weights. Deviations: one level stands for
    its whole bucket.

    Args:
        n_terms: K.
        levels: K signal-to-noise ratios, one a term.
        k, gamma: k > 0 and γ, 1 and 1 by default (the paper also takes γ = ½).
        prediction: "epsilon", "x0" or "v".

    Example:
        >>> import torch
        >>> from adaptive_loss import LossExecutor
        >>> from adaptive_loss.weighting.p2 import P2
        >>> executor = LossExecutor({"noisy": 1.0, "clear": 1.0}, weighting=P2(2, levels=[1.0, 3.0]))
        >>> p = torch.nn.Parameter(torch.tensor(1.0))
        >>> executor({"noisy": p**2, "clear": p**2}).item()
        0.75
    """

    def __init__(
        self,
        n_terms: int,
        levels: Sequence[float] | Tensor | None = None,
        k: float = 1.0,
        gamma: float = 1.0,
        prediction: Prediction = "epsilon",
    ) -> None:
        super().__init__(n_terms, levels)
        if not (k > 0 and gamma >= 0):
            raise ValueError(f"P2 got k {k} and gamma {gamma}: give k > 0 and gamma of at least 0")
        self.k, self.gamma = k, gamma
        self.prediction: Prediction = checked(prediction)

    def weigh(self, levels: Tensor) -> Tensor:
        """P2."""
        return p2(levels, self.k, self.gamma, self.prediction)
