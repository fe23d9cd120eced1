"""A small convolutional variational autoencoder."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Generator, Tensor, nn

from adaptive_loss.models import models
from adaptive_loss.models.vae import reparametrise

WIDTHS = (16, 32)
HALVINGS = 2 ** len(WIDTHS)


@models.register("conv_vae")
class ConvVAE(nn.Module):
    """Gaussian latent, Bernoulli pixels (Kingma & Welling 2014); two strided convolutions each way.

    Args:
        image_shape: ``(C, H, W)``; height and width multiples of 4.
        latent: size of the latent vector.
        hidden: width of the layer between convolutions and latent.

    Raises:
        ValueError: height or width is no multiple of 4.

    Example:
        >>> import torch
        >>> model = ConvVAE((1, 28, 28))
        >>> logits, mean, log_variance = model(torch.rand(3, 784), torch.Generator().manual_seed(0))
        >>> logits.shape, mean.shape
        (torch.Size([3, 784]), torch.Size([3, 16]))
    """

    def __init__(self, image_shape: Sequence[int], latent: int = 16, hidden: int = 128) -> None:
        super().__init__()
        channels, height, width = image_shape
        if height % HALVINGS or width % HALVINGS:
            raise ValueError(f"conv_vae takes images whose sides are multiples of {HALVINGS}, not {height}×{width}")
        self.latent = latent
        narrow, wide = WIDTHS
        inner = (wide, height // HALVINGS, width // HALVINGS)
        flat = inner[0] * inner[1] * inner[2]
        self.encoder = nn.Sequential(
            nn.Unflatten(1, tuple(image_shape)),
            nn.Conv2d(channels, narrow, 4, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(narrow, wide, 4, stride=2, padding=1),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(flat, hidden),
            nn.SiLU(),
            nn.Linear(hidden, 2 * latent),
        )
        self.decoder = nn.Sequential(
            nn.Linear(latent, hidden),
            nn.SiLU(),
            nn.Linear(hidden, flat),
            nn.SiLU(),
            nn.Unflatten(1, inner),
            nn.ConvTranspose2d(wide, narrow, 4, stride=2, padding=1),
            nn.SiLU(),
            nn.ConvTranspose2d(narrow, channels, 4, stride=2, padding=1),
            nn.Flatten(),
        )

    def forward(self, pixels: Tensor, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Pixel logits [B, D] of one reparametrised sample, and the posterior's mean and log-variance [B, latent]."""
        latent, mean, log_variance = reparametrise(self.encoder(pixels), generator)
        return self.decoder(latent), mean, log_variance
