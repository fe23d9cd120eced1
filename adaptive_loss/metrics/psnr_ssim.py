"""How like its original an image is, pixel by pixel and in its local structure."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SIGMA, K1, K2 = 1.5, 0.01, 0.03
WINDOW = 11


def psnr(images: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio 10·log₁₀(1/MSE) of each image, in decibels; ∞ for equal ones.

    Args:
        images, reference: ``[N, C, H, W]`` in 0 to 1.

    Returns:
        [N].

    Raises:
        ValueError: the shapes differ.

    Example:
        >>> psnr(torch.full((1, 1, 4, 4), 0.1), torch.zeros(1, 1, 4, 4))
        tensor([20.])
    """
    _check(images, reference)
    return -10 * (images - reference).square().flatten(1).mean(1).log10()


def ssim(images: Tensor, reference: Tensor) -> Tensor:
    r"""Structural similarity of each image (Wang, Bovik, Sheikh & Simoncelli 2004, eq. 13), 1 for equal ones.

    .. math:: \frac{(2\mu_x\mu_y + C_1)(2\sigma_{xy} + C_2)}{(\mu_x^2 + \mu_y^2 + C_1)(\sigma_x^2 + \sigma_y^2 + C_2)}

    with means, variances and covariance under a Gaussian window of 11×11 and σ 1.5, C₁ = 0.01², C₂ = 0.03², averaged
    over every place where the window lies in the image, and over channels. On images smaller than the window it is the
    largest odd one that fits.

    Args:
        images, reference: ``[N, C, H, W]`` in 0 to 1.

    Returns:
        [N].

    Raises:
        ValueError: the shapes differ.

    Example:
        >>> image = torch.rand(1, 3, 16, 16)
        >>> ssim(image, image)
        tensor([1.])
    """
    _check(images, reference)
    x, y = images.flatten(0, 1)[:, None], reference.flatten(0, 1)[:, None]
    side = min(*images.shape[2:], WINDOW)
    moments = F.conv2d(torch.cat([x, y, x * x, y * y, x * y]), _window(side - (side + 1) % 2).to(x))
    mean_x, mean_y, square_x, square_y, product = moments.chunk(5)
    variance_x, variance_y = square_x - mean_x.square(), square_y - mean_y.square()
    luminance = (2 * mean_x * mean_y + K1**2) / (mean_x.square() + mean_y.square() + K1**2)
    structure = (2 * (product - mean_x * mean_y) + K2**2) / (variance_x + variance_y + K2**2)
    return (luminance * structure).view(len(images), -1).mean(1)


def _window(side: int) -> Tensor:
    """[1, 1, side, side], of sum 1."""
    line = torch.exp(-(torch.arange(side) - side // 2).square() / (2 * SIGMA**2))
    window = line[:, None] * line
    return (window / window.sum())[None, None]


def _check(images: Tensor, reference: Tensor) -> None:
    if images.shape != reference.shape or images.ndim != 4:
        raise ValueError(f"compare images [N, C, H, W] of one shape, not {[*images.shape]} and {[*reference.shape]}")
