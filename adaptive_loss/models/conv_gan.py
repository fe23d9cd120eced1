"""Two small convolutional networks that play a game over images of 16×16: a generator and a critic."""

from __future__ import annotations

from torch import Tensor, nn

from adaptive_loss.models import models

SIDE = 16


@models.register("conv_gan")
class ImageGenerator(nn.Module):
    """Latent vectors to images in −1 to 1.

    Args:
        channels: of an image.
        latent: size of the latent vector.
        width: channels of the last hidden layer.

    Example:
        >>> import torch
        >>> ImageGenerator(1)(torch.randn(5, 32)).shape
        torch.Size([5, 1, 16, 16])
    """

    def __init__(self, channels: int, latent: int = 32, width: int = 32) -> None:
        super().__init__()
        self.latent = latent
        self.layers = nn.Sequential(
            nn.Linear(latent, 2 * width * (SIDE // 4) ** 2),
            nn.ReLU(),
            nn.Unflatten(1, (2 * width, SIDE // 4, SIDE // 4)),
            nn.ConvTranspose2d(2 * width, width, 4, 2, 1),
            nn.ReLU(),
            nn.ConvTranspose2d(width, channels, 4, 2, 1),
            nn.Tanh(),
        )

    def forward(self, latent: Tensor) -> Tensor:
        """Images ``[B, C, 16, 16]`` of latents ``[B, latent]``."""
        return self.layers(latent)


class ImageCritic(nn.Module):
    """Images to one logit each, above 0 for "real".

    Args:
        channels: of an image.
        width: channels of the first hidden layer.
        hidden: width of the last hidden layer.
    """

    def __init__(self, channels: int, width: int = 32, hidden: int = 128) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, width, 4, 2, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, 2, 1),
            nn.LeakyReLU(0.2),
            nn.Flatten(),
            nn.Linear(2 * width * (SIDE // 4) ** 2, hidden),
            nn.LeakyReLU(0.2),
        )
        self.head = nn.Linear(hidden, 1)

    def features(self, images: Tensor) -> Tensor:
        """Values of the last hidden layer, ``[B, hidden]``."""
        return self.layers(images)

    def classify(self, features: Tensor) -> Tensor:
        """Logits ``[B]`` from :meth:`features`."""
        return self.head(features).squeeze(1)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B]``."""
        return self.classify(self.features(images))
