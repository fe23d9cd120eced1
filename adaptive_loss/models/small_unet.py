"""A small U-Net that denoises images."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adaptive_loss.models import models
from adaptive_loss.models._edm import NoiseEmbedding

GROUPS = 4


class Block(nn.Module):
    """Two convolutions around a shift and a scale that the noise level sets, beside a straight path."""

    def __init__(self, inputs: int, outputs: int, embedding: int) -> None:
        super().__init__()
        self.before, self.after = nn.GroupNorm(GROUPS, inputs), nn.GroupNorm(GROUPS, outputs)
        self.first, self.second = nn.Conv2d(inputs, outputs, 3, padding=1), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.modulation = nn.Linear(embedding, 2 * outputs)
        self.straight = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        """``[B, inputs, H, W]`` and ``[B, embedding]`` → ``[B, outputs, H, W]``."""
        scale, shift = self.modulation(noise)[:, :, None, None].chunk(2, dim=1)
        hidden = self.first(F.silu(self.before(x)))
        hidden = self.second(F.silu(self.after(hidden) * (1 + scale) + shift))
        return self.straight(x) + hidden


@models.register("small_unet")
class SmallUNet(nn.Module):
    """Three resolutions (16, 8 and 4 pixels of a 16² image), a block at each on the way down and on the way up.

    It is F of :class:`~adaptive_loss.models._edm.EDMDenoiser`. It starts at 0, so the denoiser starts at c_skip·x.

    Args:
        channels: of the images, whose sides must be multiples of 4.
        width: channels at full resolution, a multiple of 4; twice as many below.

    Attributes:
        hidden_width: channels at the lowest resolution.

    Example:
        >>> SmallUNet(1)(torch.randn(2, 1, 16, 16), torch.zeros(2)).shape
        torch.Size([2, 1, 16, 16])
    """

    def __init__(self, channels: int, width: int = 16) -> None:
        super().__init__()
        wide, noise = 2 * width, 4 * width
        self.hidden_width = wide
        self.embedding = NoiseEmbedding(noise)
        self.enter = nn.Conv2d(channels, width, 3, padding=1)
        self.down = nn.ModuleList([Block(width, width, noise), Block(width, wide, noise)])
        self.lowest = Block(wide, wide, noise)
        self.up = nn.ModuleList([Block(2 * wide, wide, noise), Block(wide + width, width, noise)])
        self.output = nn.Conv2d(width, channels, 3, padding=1)
        nn.init.zeros_(self.output.weight)
        assert self.output.bias is not None
        nn.init.zeros_(self.output.bias)
        self.norm = nn.GroupNorm(GROUPS, width)

    def forward(self, images: Tensor, level: Tensor) -> Tensor:
        """``[B, C, H, W]`` and c_noise ``[B]`` → ``[B, C, H, W]``."""
        return self.with_hidden(images, level)[0]

    def with_hidden(self, images: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        """The same, and what the lowest resolution holds, ``[B, hidden_width, H/4, W/4]``."""
        noise = self.embedding(level)
        full = self.down[0](self.enter(images), noise)
        half = self.down[1](F.avg_pool2d(full, 2), noise)
        quarter = self.lowest(F.avg_pool2d(half, 2), noise)
        half = self.up[0](_joined(quarter, half), noise)
        full = self.up[1](_joined(half, full), noise)
        return self.output(F.silu(self.norm(full))), quarter


def _joined(low: Tensor, high: Tensor) -> Tensor:
    """The lower resolution, doubled, beside the higher one's own channels."""
    return torch.cat([F.interpolate(low, scale_factor=2.0, mode="nearest"), high], dim=1)
