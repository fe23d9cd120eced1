"""Digits through a codebook, with a perceptual and an adversarial term and a critic that is trained beside."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from adaptive_loss.meta.families import families
from adaptive_loss.meta.families._digits import split_digits
from adaptive_loss.meta.families.base import Family, Run, Tensors, perceptron, whole
from adaptive_loss.models.vq_autoencoder import straight_through

PLACES, SIZE = 4, 4
SEEN = 32


class Quantised(Run):
    """Four codes an image, and a critic of images."""

    def __init__(self, codes: int, hidden: int) -> None:
        super().__init__()
        self.encoder = perceptron(64, hidden, PLACES * SIZE)
        self.decoder = perceptron(PLACES * SIZE, hidden, 64)
        self.codebook = nn.Parameter(torch.empty(codes, SIZE).uniform_(-1 / codes, 1 / codes))
        self.rival = perceptron(64, hidden, 1, activation=nn.Tanh)

    def pass_through(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstruction, and the latents before and after the codebook."""
        latent = self.encoder(x).unflatten(1, (PLACES, SIZE))
        distance = self.codebook.square().sum(1) - 2 * latent @ self.codebook.T
        code = self.codebook[distance.detach().argmin(-1)]
        made = self.decoder(straight_through(latent, code.detach()).flatten(1)).sigmoid()
        return made, latent, code

    def losses(self, data: Tensors, draw: Tensors) -> Tensor:
        """[5]."""
        x = data["x"][draw["rows"]]
        made, latent, code = self.pass_through(x)
        return torch.stack(
            [
                (made - x).square().mean(),
                (seen(made, data) - seen(x, data)).square().mean(),
                (code - latent.detach()).square().mean(),
                (latent - code.detach()).square().mean(),
                F.softplus(-self.rival(made)).mean(),
            ]
        )

    def rival_loss(self, data: Tensors, draw: Tensors) -> Tensor:
        """The critic's logistic loss."""
        x = data["x"][draw["rows"]]
        made = self.pass_through(x)[0].detach()
        return F.softplus(-self.rival(x)).mean() + F.softplus(self.rival(made)).mean()

    def distance(self, x: Tensor, data: Tensors) -> Tensor:
        """Squared error, and how far the features of all that is made are from those of the data in mean and square."""
        made = self.pass_through(x)[0]
        here, there = seen(made, data), seen(x, data)
        moments = (here.mean(0) - there.mean(0)).square() + (here.square().mean(0) - there.square().mean(0)).square()
        return (made - x).square().mean() + moments.mean()

    def objective(self, data: Tensors, draw: Tensors) -> Tensor:
        """:meth:`distance`."""
        return self.distance(data["probe_x"][draw["rows"]], data)

    def judged(self, data: Tensors) -> Tensor:
        """:meth:`distance`."""
        return self.distance(data["judge_x"], data)


def seen(x: Tensor, data: Tensors) -> Tensor:
    """Features through a lens that is drawn once a run."""
    return torch.tanh(x @ data["lens"])


@families.register("vq_adversarial")
class QuantisedFamily(Family):
    """Digits, few of them."""

    name = "vq_adversarial"
    terms = ("reconstruction", "perceptual", "codebook", "commitment", "adversarial")
    base = "reconstruction"
    customary = (1.0, 1.0, 1.0, 0.25, 0.02)
    pinned = ("codebook", "commitment")
    has_rival = True

    def __init__(self, dice: Generator) -> None:
        super().__init__(dice)
        self.codes = whole(8, 32, dice)

    def run(self) -> Run:
        """Autoencoder and critic."""
        return Quantised(self.codes, self.hidden)

    def data(self, dice: Generator) -> dict[str, Tensor]:
        """A split of the digits of its own, and a lens."""
        return {**split_digits(self.n_train, dice), "lens": torch.randn(64, SEEN, generator=dice) / 4}
