"""EDM2: the uncertainty of every noise level, learned."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from adaptive_loss.weighting import weightings
from adaptive_loss.weighting.base import Context
from adaptive_loss.weighting.noise_levels import NoiseLevels, edm


def edm2_loss(squared_error: Tensor, sigma: Tensor, log_variance: Tensor, sigma_data: float = 0.5) -> Tensor:
    """(λ(σ)/e^{u(σ)})·‖D − y‖² + u(σ), for per-sample losses (Karras et al. 2024, eq. 14–16 and 21).

    Args:
        squared_error: ‖D − y‖² a sample, a mean over its dimensions; any shape.
        sigma: noise's standard deviations σ, of that shape.
        log_variance: u(σ), of that shape.
        sigma_data: σd of λ.

    Example:
        >>> edm2_loss(torch.tensor([0.5]), torch.tensor([1.0]), torch.tensor([math.log(2)]))  # 5/2·0.5 + ln 2
        tensor([1.9431])
    """
    return edm(sigma, sigma_data) * torch.exp(-log_variance) * squared_error + log_variance


class NoiseLogVariance(nn.Module):
    """u(σ): Fourier features √2·cos(ω·(ln σ)/4 + φ) of fixed ω ~ N(0, (2π)²), φ ~ U(0, 2π), and a linear layer.

    Args:
        channels: features, 128 in the public code.
        seed: of ω and φ.

    Example:
        >>> NoiseLogVariance()(torch.tensor([0.1, 1.0]))
        tensor([0., 0.], grad_fn=<DivBackward0>)
    """

    frequencies: Tensor
    phases: Tensor

    def __init__(self, channels: int = 128, seed: int = 0) -> None:
        super().__init__()
        dice = torch.Generator().manual_seed(seed)
        self.register_buffer("frequencies", 2 * math.pi * torch.randn(channels, generator=dice))
        self.register_buffer("phases", 2 * math.pi * torch.rand(channels, generator=dice))
        self.weight = nn.Parameter(torch.zeros(channels))

    def forward(self, sigma: Tensor) -> Tensor:
        """u of noise levels of any shape, on their device."""
        frequencies, phases, weight = (x.to(sigma.device) for x in (self.frequencies, self.phases, self.weight))
        level = sigma.log().to(weight.dtype)[..., None] / 4
        features = math.sqrt(2) * torch.cos(level * frequencies + phases)
        return (features * weight).sum(-1) / math.sqrt(len(weight))


@weightings.register("edm2_uncertainty")
class EDM2Uncertainty(NoiseLevels):
    """Total = Σᵢ (λ(σᵢ)/e^{u(σᵢ)})·Lᵢ + u(σᵢ), with u a small function of the noise level learned with the model.

    λ is EDM's weight, Lᵢ = ‖D − y‖² at level σᵢ; e^u finds each level's weighted loss, so every level counts the same.

    Reference: Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models", CVPR 2024, eq. 21.

    Choose it when a diffusion model trains over many noise levels whose losses drift apart. Give
    ``executor.parameters()`` to the optimizer. For a loss a sample, call ``edm2_loss(error, sigma, rule.u(sigma))``.
    Metrics it logs: the weights λ/e^u. Deviations: u starts at 0, so the rule starts as ``edm`` (public code: at a
    random function, its weights normalised); a term that is absent adds no penalty; one level stands for its bucket.

    Args:
        n_terms: K.
        levels: K standard deviations σ > 0, one a term.
        sigma_data: σd, 0.5 in the paper.
        channels: Fourier features of u.
        seed: of the features.

    Example:
        >>> import torch
        >>> from adaptive_loss import LossExecutor
        >>> from adaptive_loss.weighting.edm2_uncertainty import EDM2Uncertainty
        >>> executor = LossExecutor({"clear": 1.0, "noisy": 1.0}, weighting=EDM2Uncertainty(2, levels=[0.5, 1.0]))
        >>> p = torch.nn.Parameter(torch.tensor(1.0))
        >>> executor({"clear": p**2, "noisy": p**2}).item(), [tuple(q.shape) for q in executor.parameters()]
        (13.0, [(128,)])
    """

    needs = ("noise levels",)
    unit = "standard deviation σ"

    def __init__(
        self,
        n_terms: int,
        levels: Sequence[float] | Tensor | None = None,
        sigma_data: float = 0.5,
        channels: int = 128,
        seed: int = 0,
    ) -> None:
        super().__init__(n_terms, levels)
        if not (sigma_data > 0 and channels >= 1):
            raise ValueError(f"EDM2Uncertainty got sigma_data {sigma_data} and {channels} channels: give positive ones")
        self.sigma_data = sigma_data
        self.u = NoiseLogVariance(channels, seed)

    def weigh(self, levels: Tensor) -> Tensor:
        """λ(σ)/e^{u(σ)}, differentiable in u."""
        return edm(levels, self.sigma_data) * torch.exp(-self.u(levels).double())

    def penalty(self, context: Context) -> Tensor:
        """Σ u(σᵢ) over the terms that are there."""
        return self.u(self.levels[context.present]).sum()
