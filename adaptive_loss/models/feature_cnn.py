"""A small frozen classifier whose hidden features tell how alike two sets of images are."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from adaptive_loss.models import models

Style = Literal["smooth", "sharp"]
LEAK = 0.1
"""Slope of a sharp activation below 0."""


@models.register("feature_cnn")
class FeatureCNN(nn.Module):
    """Two or more halving convolutions and a hidden layer, whose standardised values are the features.

    Weights are drawn from PyTorch's global generator; seed it first for a repeatable start.

    Args:
        image_shape: ``(C, H, W)``; height and width at least ``2 ** len(widths)``.
        classes: number of classes.
        widths: channels of each convolution.
        features: D, size of the hidden layer.
        style: "smooth" strides and uses SiLU; "sharp" takes maxima and uses a leaky ReLU, as a plain one leaves
            features that never fire and tell nothing of any image.

    Raises:
        ValueError: the image is too small for that many convolutions.

    Example:
        >>> network = FeatureCNN((1, 8, 8), features=32)
        >>> network.features(torch.rand(5, 1, 8, 8)).shape
        torch.Size([5, 32])
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        classes: int = 10,
        *,
        widths: Sequence[int] = (16, 32),
        features: int = 64,
        style: Style = "smooth",
    ) -> None:
        super().__init__()
        channels, height, width = image_shape
        if min(height, width) < 2 ** len(widths):
            raise ValueError(f"{len(widths)} halvings need images of {2 ** len(widths)} pixels, not {height}×{width}")
        pairs = itertools.pairwise([channels, *widths])
        self.blocks = nn.Sequential(*(_halving(inputs, outputs, style) for inputs, outputs in pairs), nn.Flatten())
        with torch.no_grad():
            flat = self.blocks(torch.zeros(1, *image_shape)).shape[1]
        self.hidden = nn.Sequential(nn.Linear(flat, features), _activation(style))
        self.head = nn.Linear(features, classes)
        self.pixel_mean, self.pixel_std = nn.Buffer(torch.zeros(channels)), nn.Buffer(torch.ones(channels))
        self.feature_mean, self.feature_std = nn.Buffer(torch.zeros(features)), nn.Buffer(torch.ones(features))

    def features(self, images: Tensor) -> Tensor:
        """Features ``[N, D]`` of images ``[N, C, H, W]`` in 0 to 1; mean 0 and deviation 1 over the training images."""
        return (self._hidden(images) - self.feature_mean) / self.feature_std

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[N, classes]``."""
        return self.head(self._hidden(images))

    def _hidden(self, images: Tensor) -> Tensor:
        return self.hidden(self.blocks((images - self.pixel_mean[:, None, None]) / self.pixel_std[:, None, None]))


def _activation(style: Style) -> nn.Module:
    return nn.SiLU() if style == "smooth" else nn.LeakyReLU(LEAK)


def _halving(inputs: int, outputs: int, style: Style) -> nn.Sequential:
    if style == "smooth":
        return nn.Sequential(nn.Conv2d(inputs, outputs, 4, stride=2, padding=1), _activation(style))
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.MaxPool2d(2), _activation(style))
