"""Two perceptrons that play a game over points: a generator and a critic."""

from __future__ import annotations

import itertools

from torch import Tensor, nn

from adaptive_loss.models import models


@models.register("mlp_gan")
class PointGenerator(nn.Module):
    """Latent vectors to points: three hidden layers.

    Args:
        outputs: coordinates of a point.
        latent: size of the latent vector.
        hidden: width of the hidden layers.

    Example:
        >>> import torch
        >>> PointGenerator(2)(torch.randn(5, 8)).shape
        torch.Size([5, 2])
    """

    def __init__(self, outputs: int = 2, latent: int = 8, hidden: int = 128) -> None:
        super().__init__()
        self.latent = latent
        self.layers = nn.Sequential(*_hidden(latent, hidden, nn.ReLU()), nn.Linear(hidden, outputs))

    def forward(self, latent: Tensor) -> Tensor:
        """Points ``[B, outputs]`` of latents ``[B, latent]``."""
        return self.layers(latent)


class PointCritic(nn.Module):
    """Points to one logit each, above 0 for "real": three hidden layers.

    Args:
        inputs: coordinates of a point.
        hidden: width of the hidden layers.
    """

    def __init__(self, inputs: int = 2, hidden: int = 128) -> None:
        super().__init__()
        self.layers = nn.Sequential(*_hidden(inputs, hidden, nn.LeakyReLU(0.2)))
        self.head = nn.Linear(hidden, 1)

    def features(self, points: Tensor) -> Tensor:
        """Values of the last hidden layer, ``[B, hidden]``."""
        return self.layers(points)

    def classify(self, features: Tensor) -> Tensor:
        """Logits ``[B]`` from :meth:`features`."""
        return self.head(features).squeeze(1)

    def forward(self, points: Tensor) -> Tensor:
        """Logits ``[B]``."""
        return self.classify(self.features(points))


def _hidden(inputs: int, width: int, activation: nn.Module) -> list[nn.Module]:
    sizes = [inputs, width, width, width]
    return [part for a, b in itertools.pairwise(sizes) for part in (nn.Linear(a, b), activation)]
