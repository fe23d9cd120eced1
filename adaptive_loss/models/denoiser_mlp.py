"""A small multi-layer perceptron that denoises points."""

from __future__ import annotations

from torch import Tensor, nn

from adaptive_loss.models import models
from adaptive_loss.models._edm import NoiseEmbedding


@models.register("denoiser_mlp")
class DenoiserMLP(nn.Module):
    """Three residual layers of SiLU units, each shifted by the noise level's embedding.

    It is F of :class:`~adaptive_loss.models._edm.EDMDenoiser`. It starts at 0, so the denoiser starts at c_skip·x.

    Args:
        dimensions: D, of a point.
        width: units a layer.
        depth: layers.

    Example:
        >>> import torch
        >>> DenoiserMLP(2)(torch.randn(5, 2), torch.zeros(5)).shape
        torch.Size([5, 2])
    """

    def __init__(self, dimensions: int, width: int = 64, depth: int = 3) -> None:
        super().__init__()
        self.embedding = NoiseEmbedding(width)
        self.enter = nn.Linear(dimensions, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.shifts = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.activation = nn.SiLU()
        self.output = nn.Linear(width, dimensions)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, points: Tensor, level: Tensor) -> Tensor:
        """``[B, D]`` and c_noise ``[B]`` → ``[B, D]``."""
        noise, hidden = self.embedding(level), self.enter(points)
        for layer, shift in zip(self.layers, self.shifts, strict=True):
            hidden = hidden + self.activation(layer(hidden) + shift(noise))
        return self.output(hidden)
