"""A small variational autoencoder for images."""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn

from adaptive_loss.models import models


@models.register("vae")
class VAE(nn.Module):
    """Gaussian latent, Bernoulli pixels (Kingma & Welling 2014); encoder and decoder are two-layer perceptrons.

    Args:
        pixels: D, number of pixels of a flattened image.
        latent: size of the latent vector.
        hidden: width of the hidden layers.

    Example:
        >>> model = VAE(64)
        >>> logits, mean, log_variance = model(torch.rand(3, 64), torch.Generator().manual_seed(0))
        >>> logits.shape, mean.shape
        (torch.Size([3, 64]), torch.Size([3, 8]))
    """

    def __init__(self, pixels: int, latent: int = 8, hidden: int = 128) -> None:
        super().__init__()
        self.latent = latent
        self.encoder = nn.Sequential(
            nn.Linear(pixels, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, 2 * latent)
        )
        self.decoder = nn.Sequential(
            nn.Linear(latent, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, pixels)
        )

    def forward(self, pixels: Tensor, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Pixel logits [B, D] of one reparametrised sample, and the posterior's mean and log-variance [B, latent]."""
        latent, mean, log_variance = reparametrise(self.encoder(pixels), generator)
        return self.decoder(latent), mean, log_variance


def reparametrise(encoded: Tensor, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
    """z = μ + σε with ε ~ N(0, I), μ and log σ² from ``[B, 2·latent]``, the mean in the first half."""
    mean, log_variance = encoded.chunk(2, dim=1)
    noise = torch.randn(mean.shape, generator=generator).to(mean)
    return mean + noise * (log_variance / 2).exp(), mean, log_variance
