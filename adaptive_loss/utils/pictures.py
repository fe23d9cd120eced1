"""Images for people: many of them as one, and that as a PNG file."""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

TILE = 64
"""Pixels a side that a smaller image is enlarged to, in whole steps."""
GAP = 2


def grid(images: Tensor) -> NDArray[np.uint8]:
    """Images ``[N, C, H, W]`` in 0 to 1, C 1 or 3, as one ``[height, width, 3]`` in about a square, row by row.

    Args:
        images: what is beyond 0 to 1 is clipped; NaN is black. Small ones are enlarged, each pixel to a square.

    Raises:
        ValueError: another shape, or no image.

    Example:
        >>> import torch
        >>> grid(torch.rand(5, 1, 64, 64)).shape
        (134, 200, 3)
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3) or not len(images):
        raise ValueError(f"pictures are images [N, 1 or 3, H, W] with N at least 1, not {list(images.shape)}")
    number, _, height, width = images.shape
    factor = max(1, TILE // max(height, width))
    pixels = (images.detach().float().nan_to_num(0.0).clamp(0, 1) * 255).round().byte().cpu()
    tiles = pixels.expand(-1, 3, -1, -1).repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    tiles = tiles.permute(0, 2, 3, 1)
    columns = math.ceil(math.sqrt(number))
    rows, (high, wide) = math.ceil(number / columns), tiles.shape[1:3]
    whole = tiles.new_full((rows * (high + GAP) + GAP, columns * (wide + GAP) + GAP, 3), 255)
    for place, tile in enumerate(tiles):
        top, left = (GAP + i * (side + GAP) for i, side in zip(divmod(place, columns), (high, wide), strict=True))
        whole[top : top + high, left : left + wide] = tile
    return whole.numpy()


def png(image: NDArray[np.uint8]) -> bytes:
    """``[H, W, 3]`` as a PNG file's content: the same bytes for the same image.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.image import imsave

    buffer = io.BytesIO()
    imsave(buffer, image, format="png")
    return buffer.getvalue()
