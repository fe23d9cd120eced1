"""The model that the reliability of rules is tried on."""

from __future__ import annotations

import torch
from torch import Tensor, nn

WEIGHTS = {"a": 1.0, "b": 0.5, "c": 2.0}


class ThreeHeads(nn.Module):
    """A trunk and a head a term; the losses differ in scale and pull apart."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.trunk = nn.Sequential(nn.Linear(4, 8), nn.Tanh())
            self.heads = nn.ModuleList(nn.Linear(8, 1) for _ in WEIGHTS)

    def forward(self, x: Tensor, without: str = "") -> tuple[dict[str, Tensor], Tensor]:
        """The losses at [N, 4] inputs, one of them left out, and the features to take gradients at."""
        features = self.trunk(x)
        losses = [(head(features) - 1.5 * i).square().mean() * 10.0**i for i, head in enumerate(self.heads)]
        return {name: loss for name, loss in zip(WEIGHTS, losses, strict=True) if name != without}, features
