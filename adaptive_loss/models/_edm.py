"""What makes a network a denoiser that works at every noise level."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

SIGMA_DATA = 0.5
FREQUENCIES = 8


class EDMDenoiser(nn.Module):
    """D(x; σ) = c_skip·x + c_out·F(c_in·x; c_noise), preconditioned (Karras et al. 2022, table 1 and eq. 7).

    c_skip = σd²/(σ² + σd²), c_out = σ·σd/√(σ² + σd²), c_in = 1/√(σ² + σd²), c_noise = ln(σ)/4: what F takes and what
    it has to give both have variance 1 at every σ.

    Args:
        network: F, called with ``[B, …]`` and ``[B]``.
        sigma_data: σd, the data's standard deviation.

    Example:
        >>> denoiser = EDMDenoiser(lambda x, level: torch.zeros_like(x))
        >>> denoiser(torch.tensor([[2.0]]), torch.tensor([0.5]))
        tensor([[1.]])
    """

    def __init__(self, network: nn.Module, sigma_data: float = SIGMA_DATA) -> None:
        super().__init__()
        self.network, self.sigma_data = network, sigma_data

    def forward(self, noisy: Tensor, sigma: Tensor) -> Tensor:
        """The clean example expected behind x. ``[B, …]``, ``[B]`` → ``[B, …]``, in the type of ``noisy``."""
        return self.combine(noisy, sigma, self.network(*self.inputs(noisy, sigma)))

    def inputs(self, noisy: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """c_in·x and c_noise, what F takes."""
        return noisy / self._levels(noisy, sigma)[1], sigma.log() / 4

    def combine(self, noisy: Tensor, sigma: Tensor, raw: Tensor) -> Tensor:
        """c_skip·x + c_out·F."""
        level, total = self._levels(noisy, sigma)
        return (self.sigma_data / total) ** 2 * noisy + level * self.sigma_data / total * raw.to(noisy.dtype)

    def _levels(self, noisy: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """σ and √(σ² + σd²), in a shape that goes with x."""
        level = sigma.view(-1, *[1] * (noisy.dim() - 1))
        return level, (level.square() + self.sigma_data**2).sqrt()


class NoiseEmbedding(nn.Module):
    """cos and sin of c_noise at eight frequencies π·2^(j/2), through two layers. ``[B]`` → ``[B, width]``."""

    frequencies: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", math.pi * 2 ** (torch.arange(FREQUENCIES) / 2))
        self.layers = nn.Sequential(nn.Linear(2 * FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())

    def forward(self, level: Tensor) -> Tensor:
        """The embedding of noise levels c_noise."""
        angles = level[:, None] * self.frequencies
        return self.layers(torch.cat([angles.cos(), angles.sin()], dim=1))
