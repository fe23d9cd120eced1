"""One trunk, a classifier for each of two objects in an image, and a decoder of the whole image."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from adaptive_loss.models import models

WIDTHS = (16, 32)
HALVINGS = 2 ** len(WIDTHS)


@models.register("multi_head")
class MultiHead(nn.Module):
    """Two strided convolutions and a hidden layer, whose features two linear heads and a decoder share.

    Weights are drawn from PyTorch's global generator; seed it first for a repeatable start.

    Args:
        image_shape: ``(C, H, W)``; height and width multiples of 4.
        classes: of each head.
        features: D, size of the hidden layer, through which everything passes.

    Raises:
        ValueError: height or width is no multiple of 4.

    Example:
        >>> import torch
        >>> model = MultiHead((1, 12, 12))
        >>> features = model(torch.rand(3, 1, 12, 12))
        >>> model.left(features).shape, model.right(features).shape, model.decoder(features).shape
        (torch.Size([3, 10]), torch.Size([3, 10]), torch.Size([3, 1, 12, 12]))
    """

    def __init__(self, image_shape: Sequence[int], classes: int = 10, features: int = 64) -> None:
        super().__init__()
        channels, height, width = image_shape
        if height % HALVINGS or width % HALVINGS:
            raise ValueError(f"multi_head takes images whose sides are multiples of {HALVINGS}, not {height}×{width}")
        narrow, wide = WIDTHS
        inner = (wide, height // HALVINGS, width // HALVINGS)
        flat = inner[0] * inner[1] * inner[2]
        self.trunk = nn.Sequential(
            nn.Conv2d(channels, narrow, 4, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(narrow, wide, 4, stride=2, padding=1),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(flat, features),
            nn.SiLU(),
        )
        self.left, self.right = nn.Linear(features, classes), nn.Linear(features, classes)
        self.decoder = nn.Sequential(
            nn.Linear(features, flat),
            nn.SiLU(),
            nn.Unflatten(1, inner),
            nn.ConvTranspose2d(wide, narrow, 4, stride=2, padding=1),
            nn.SiLU(),
            nn.ConvTranspose2d(narrow, channels, 4, stride=2, padding=1),
            nn.Sigmoid(),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Features ``[B, D]`` of float images ``[B, C, H, W]``, for ``left``, ``right`` and ``decoder``."""
        return self.trunk(images)
