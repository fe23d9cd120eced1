"""A variational autoencoder: reconstruction and KL divergence."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from adaptive_loss.losses import LossTerms
from adaptive_loss.models.vae import VAE
from adaptive_loss.probes import held_out
from adaptive_loss.seeding import own_generator
from adaptive_loss.tasks import tasks
from adaptive_loss.tasks.base import Task

PROBE_BATCH = 64


def bernoulli_reconstruction(logits: Tensor, pixels: Tensor) -> Tensor:
    """−log p(x|z) in nats an image: Σ over pixels of the binary cross-entropy, mean over the batch. [B, D] → 0-dim."""
    return F.binary_cross_entropy_with_logits(logits, pixels, reduction="none").sum(1).mean()


def gaussian_kl(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(μ, σ²) ‖ N(0, I)) = ½ Σ (μ² + σ² − log σ² − 1) in nats an image, mean over the batch. [B, Z] → 0-dim."""
    return (mean.square() + log_variance.exp() - log_variance - 1).sum(1).mean() / 2


@tasks.register("vae")
class VariationalAutoencoder(Task):
    """Terms ``reconstruction`` (base) and ``kl``, both in nats an image; the objective is −ELBO, their plain sum.

    Probing the reconstruction alone would drive the KL's weight to its floor. ``evaluate`` gives ``loss`` = −ELBO in
    nats an image, ``reconstruction``, ``kl`` and ``bits_per_dim`` = −ELBO/(D log 2).
    """

    terms = ("reconstruction", "kl")
    base = "reconstruction"

    def __init__(self, config: Any, data: Any, device: torch.device, **options: Any) -> None:
        super().__init__(config, data, device, **options)
        self.pixels = math.prod(data.image_shape)
        self.model = VAE(self.pixels).to(device)
        self.noise = own_generator(config.seed, "latent")
        self.probe = held_out(
            self._objective,
            self.splits["probe"].images,
            batch_size=PROBE_BATCH,
            model=self.model,
            seed=own_generator(config.seed, "probe").initial_seed(),
        )

    def losses(self, rows: Tensor) -> LossTerms:
        """Both terms on one batch."""
        terms, self.tap = self._terms(self.splits["train"].images[rows.to(self.device)], self.noise)
        return {name: loss for name, loss in terms.items() if name in self.wanted}

    def _terms(self, images: Tensor, noise: Generator) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Both terms, and the posterior's parameters, through which both reach the encoder."""
        pixels = images.flatten(1).float() / 255
        logits, mean, log_variance = self.model(pixels, noise)
        terms = {
            "reconstruction": bernoulli_reconstruction(logits, pixels),
            "kl": gaussian_kl(mean, log_variance),
        }
        return terms, [mean, log_variance]

    def _objective(self, images: Tensor) -> Tensor:
        # Drawn from the probe's own generator, so that its one state covers images and noise.
        terms, _ = self._terms(images, self.probe.generator)
        return terms["reconstruction"] + terms["kl"]

    @torch.no_grad()
    def evaluate(self, split: str) -> Mapping[str, float]:
        """−ELBO and its parts; the latent noise is the same at every call."""
        noise = own_generator(self.config.seed, f"evaluate {split}")
        totals, count = {"reconstruction": 0.0, "kl": 0.0}, 0
        self.model.eval()
        for images, _ in self.evaluation_batches(split):
            for name, value in self._terms(images, noise)[0].items():
                totals[name] += float(value) * len(images)
            count += len(images)
        self.model.train()
        means = {name: total / count for name, total in totals.items()}
        loss = sum(means.values())
        return {"loss": loss, **means, "bits_per_dim": loss / self.pixels / math.log(2)}

    def state_dict(self) -> dict[str, Any]:
        """The latent noise's generator."""
        return {"noise": self.noise.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self.noise.set_state(state["noise"])
