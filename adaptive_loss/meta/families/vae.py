"""A VAE on digits whose KL has a wrong weight, judged by −ELBO."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from adaptive_loss.meta.families import families
from adaptive_loss.meta.families._digits import HELD_OUT, split_digits
from adaptive_loss.meta.families.base import BATCH, Family, Run, Tensors, perceptron, whole
from adaptive_loss.tasks.vae import bernoulli_reconstruction, gaussian_kl


class Autoencoder(Run):
    """Gaussian latent, Bernoulli pixels."""

    def __init__(self, latent: int, hidden: int) -> None:
        super().__init__()
        self.encoder, self.decoder = perceptron(64, hidden, 2 * latent), perceptron(latent, hidden, 64)

    def parts(self, x: Tensor, noise: Tensor) -> Tensor:
        """[2] reconstruction and KL, nats an image."""
        mean, log_variance = self.encoder(x).chunk(2, dim=1)
        logits = self.decoder(mean + noise * (log_variance / 2).exp())
        return torch.stack([bernoulli_reconstruction(logits, x), gaussian_kl(mean, log_variance)])

    def losses(self, data: Tensors, draw: Tensors) -> Tensor:
        """[2]."""
        return self.parts(data["x"][draw["rows"]], draw["noise"])

    def objective(self, data: Tensors, draw: Tensors) -> Tensor:
        """−ELBO."""
        return self.parts(data["probe_x"][draw["rows"]], draw["noise"]).sum()

    def judged(self, data: Tensors) -> Tensor:
        """−ELBO, its noise drawn once for good."""
        return self.parts(data["judge_x"], data["noise"]).sum()


@families.register("vae")
class VAEFamily(Family):
    """Digits, few of them."""

    name = "vae"
    terms = ("reconstruction", "kl")
    base = "reconstruction"
    customary = (1.0, 1.0)

    def __init__(self, dice: Generator) -> None:
        super().__init__(dice)
        self.latent = whole(2, 12, dice)

    def run(self) -> Run:
        """A VAE."""
        return Autoencoder(self.latent, self.hidden)

    def data(self, dice: Generator) -> dict[str, Tensor]:
        """A split of the digits of its own, and the noise of the judging part."""
        return {**split_digits(self.n_train, dice), "noise": torch.randn(HELD_OUT, self.latent, generator=dice)}

    def draws(self, steps: int, dice: Generator) -> dict[str, Tensor]:
        """Rows and noise."""
        return {**super().draws(steps, dice), "noise": torch.randn(steps, BATCH, self.latent, generator=dice)}

    def looks(self, count: int, dice: Generator) -> dict[str, Tensor]:
        """Rows and noise."""
        return {**super().looks(count, dice), "noise": torch.randn(count, BATCH, self.latent, generator=dice)}
