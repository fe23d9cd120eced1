"""An autoencoder through a codebook, and the discriminator that looks at what it makes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from adaptive_loss.models import models

SMALL = 16
"""Sides in pixels below which an image is halved once, not twice."""


def straight_through(latent: Tensor, value: Tensor) -> Tensor:
    """``value``, to the last bit; the gradient passes to ``latent`` unchanged (Bengio et al. 2013), and to ``value``.

    Detach ``value`` to have the estimator of van den Oord et al. (2017), in which the codes get none.

    Example:
        >>> z = torch.tensor([0.3], requires_grad=True)
        >>> (2 * straight_through(z, torch.ones(1))).backward()
        >>> z.grad
        tensor([2.])
    """
    return value + (latent - latent.detach())


@models.register("vq_autoencoder")
class VQAutoencoder(nn.Module):
    """Images to a grid of vectors, each replaced by the nearest of K codes, and back (van den Oord et al. 2017).

    Images below 16 pixels are halved once, others twice.

    Args:
        image_shape: ``(C, H, W)``; height and width multiples of 4, or of 2 below 16.
        codes: K.
        size: of a code.
        width: channels of the convolutions.

    Raises:
        ValueError: height or width cannot be halved so often.

    Example:
        >>> model = VQAutoencoder((1, 28, 28))
        >>> reconstruction, latent, code = model(torch.zeros(3, 1, 28, 28))
        >>> reconstruction.shape, latent.shape == code.shape
        (torch.Size([3, 1, 28, 28]), True)
    """

    def __init__(self, image_shape: Sequence[int], codes: int = 64, size: int = 8, width: int = 32) -> None:
        super().__init__()
        channels, height, inner = image_shape[0], min(image_shape[1:]), width
        halvings = 1 if height < SMALL else 2
        if any(side % 2**halvings for side in image_shape[1:]):
            raise ValueError(
                f"vq_autoencoder halves {halvings} times: sides are multiples of {2**halvings}, "
                f"not {image_shape[1]}×{image_shape[2]}"
            )
        down = [part for _ in range(halvings) for part in (nn.Conv2d(inner, inner, 4, 2, 1), nn.SiLU())]
        up = [part for _ in range(halvings) for part in (nn.ConvTranspose2d(inner, inner, 4, 2, 1), nn.SiLU())]
        self.encoder = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1), nn.SiLU(), *down, nn.Conv2d(width, size, 1)
        )
        self.decoder = nn.Sequential(nn.Conv2d(size, width, 3, padding=1), nn.SiLU(), *up)
        self.last = nn.Conv2d(width, channels, 3, padding=1)
        self.codebook = nn.Parameter(torch.empty(codes, size).uniform_(-1 / codes, 1 / codes))

    def nearest(self, latent: Tensor) -> Tensor:
        """Indices ``[B, h, w]`` of the codes nearest to ``latent``, ``[B, size, h, w]``."""
        flat = latent.detach().movedim(1, -1)
        return (self.codebook.detach().square().sum(1) - 2 * flat @ self.codebook.detach().T).argmin(-1)

    def forward(self, images: Tensor, *, to_codes: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """The reconstruction ``[B, C, H, W]``, the latent before and after the codebook ``[B, size, h, w]``.

        Args:
            images: ``[B, C, H, W]``.
            to_codes: let the reconstruction's gradient reach the codes, too.
        """
        latent = self.encoder(images)
        code = self.codebook[self.nearest(latent)].movedim(-1, 1)
        passed = straight_through(latent, code if to_codes else code.detach())
        return self.last(self.decoder(passed)), latent, code


class PatchDiscriminator(nn.Module):
    """Images to a grid of logits, one a patch, above 0 for "real" (Isola et al. 2017).

    Args:
        channels: of the images.
        width: channels of the first convolution.
    """

    def __init__(self, channels: int, width: int = 32) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, width, 4, 2, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, 2, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 1, 3, padding=1),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, 1, H/4, W/4]``."""
        return self.layers(images)
