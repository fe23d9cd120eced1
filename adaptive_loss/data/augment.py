"""From stored bytes to a training batch: random flips and crops of whole batches, and normalisation.

Augmentations work on uint8 and draw from a generator of their own, so switching one on shifts nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Generator, Tensor

from adaptive_loss.errors import UsageError

Augment = Callable[[Tensor, Generator], Tensor]
"""``(uint8 images [B, C, H, W], generator) -> uint8 images`` of the same shape."""


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    r"""Standard units: :math:`(x / 255 - \mu_c) / \sigma_c`.

    Args:
        images: uint8 ``[B, C, H, W]``.
        mean, std: float32 ``[C]``, in units of full scale (0 to 1).

    Returns:
        float32 ``[B, C, H, W]``; 3-channel images in the channels-last memory format, which convolutions on a CPU
        run faster on.

    Example:
        >>> import torch
        >>> white = torch.full((1, 1, 2, 2), 255, dtype=torch.uint8)
        >>> normalise(white, torch.tensor([0.5]), torch.tensor([0.25])).unique().tolist()
        [2.0]
    """
    column = (-1, 1, 1)
    floats = images.to(torch.float32, copy=True).mul_((1 / (255 * std)).view(column)).sub_((mean / std).view(column))
    # Scaled first and laid out after: a factor per channel over channels-last memory is four times as slow.
    return floats.contiguous(memory_format=torch.channels_last) if images.shape[1] == 3 else floats


def none(images: Tensor, generator: Generator) -> Tensor:
    """The images as they are; draws nothing."""
    del generator
    return images


def standard(
    images: Tensor, generator: Generator, *, flip: bool, pad: int, border: Literal["reflect", "zero"] = "reflect"
) -> Tensor:
    """Each image mirrored left to right with chance one half, then cropped at a random place from a padded frame.

    The padded frame is never built: row and column of every target pixel are computed and read with one gather.
    The same numbers are drawn whatever ``flip`` says, so switching it leaves the crops as they were.

    Args:
        images: uint8 ``[B, C, H, W]``.
        generator: draws the offsets and flips.
        flip: mirror half of the images; not for digits or letters.
        pad: pixels added on every side before the crop; the shift is within ±pad.
        border: what the added pixels hold: the image mirrored at its edge, or zeros.

    Returns:
        uint8, the same shape.

    Raises:
        ValueError: ``pad`` is negative or not smaller than the image.

    Example:
        >>> import torch
        >>> images = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8)
        >>> standard(images, torch.Generator().manual_seed(0), flip=True, pad=2).shape
        torch.Size([1, 1, 8, 8])
    """
    batch, channels, height, width = images.shape
    if not 0 <= pad < min(height, width):
        raise ValueError(f"pad must be from 0 to {min(height, width) - 1} for {height}x{width} images, not {pad}")
    device = images.device
    shifts = torch.randint(-pad, pad + 1, (2, batch, 1), generator=generator).to(device)
    mirrored = torch.randint(0, 2, (batch, 1), generator=generator).bool().to(device)
    rows = torch.arange(height, device=device) + shifts[0]
    columns = torch.arange(width, device=device) + shifts[1]
    if flip:
        columns = torch.where(mirrored, width - 1 - columns, columns)
    source = _reflect(rows, height)[:, :, None] * width + _reflect(columns, width)[:, None, :]
    source = source.flatten(1)[:, None].expand(-1, channels, -1)
    moved = images.flatten(2).gather(2, source).view(images.shape)
    if border == "zero":
        inside = _inside(rows, height)[:, :, None] & _inside(columns, width)[:, None, :]
        moved = moved * inside[:, None]
    return moved


def _reflect(position: Tensor, size: int) -> Tensor:
    """Positions outside 0 … size−1 mirrored at the edge pixel's centre."""
    last = size - 1
    return last - (last - position.abs()).abs()


def _inside(position: Tensor, size: int) -> Tensor:
    return (position >= 0) & (position < size)


def augmenter(name: str, dataset: str) -> Augment:
    """The augmentation called ``name`` with the strength that suits a dataset.

    Args:
        name: "none" or "standard".
        dataset: the dataset's name; one that is not known here is shifted by a pixel at most and never mirrored.

    Raises:
        UsageError: no augmentation has that name.

    Example:
        >>> augmenter("none", "cifar10") is none
        True
    """
    if name == "none":
        return none
    if name != "standard":
        raise UsageError(f"unknown --augment {name!r}; choose from: none, standard")
    if dataset in ("cifar10", "cifar10_loader"):
        return partial(standard, flip=True, pad=4)
    # A mirrored digit is another sign, and its strokes reach the edge: beyond it there is paper, not more stroke.
    return partial(standard, flip=False, pad=1, border="zero")
