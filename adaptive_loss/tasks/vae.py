"""A variational autoencoder: reconstruction and KL divergence."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from adaptive_loss.losses import LossTerms
from adaptive_loss.metrics.bits_per_dim import bits_per_dim
from adaptive_loss.metrics.features import has_features, load_features
from adaptive_loss.models.conv_vae import ConvVAE
from adaptive_loss.models.vae import VAE
from adaptive_loss.probes import evaluating, held_out, sample_quality
from adaptive_loss.seeding import own_generator
from adaptive_loss.tasks import tasks
from adaptive_loss.tasks._sample_metrics import sample_metrics
from adaptive_loss.tasks.base import ImageTask

PROBE_BATCH = 64
SHOWN = 8
"""Samples a side of a picture, and images with their reconstructions."""
CONVOLUTIONAL_FROM = 16
"""Height in pixels from which the model is convolutional unless ``--model`` says otherwise."""


def bernoulli_reconstruction(logits: Tensor, pixels: Tensor) -> Tensor:
    """−log p(x|z) in nats an image: Σ over pixels of the binary cross-entropy, mean over the batch. [B, D] → 0-dim."""
    return F.binary_cross_entropy_with_logits(logits, pixels, reduction="none").sum(1).mean()


def gaussian_kl(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(μ, σ²) ‖ N(0, I)) = ½ Σ (μ² + σ² − log σ² − 1) in nats an image, mean over the batch. [B, Z] → 0-dim."""
    return (mean.square() + log_variance.exp() - log_variance - 1).sum(1).mean() / 2


@tasks.register("vae")
class VariationalAutoencoder(ImageTask):
    """Terms ``reconstruction`` (base) and ``kl``, both in nats an image.

    The objective ``elbo`` is −ELBO, their plain sum: probing the reconstruction alone would drive the KL's weight to
    its floor. ``sample_quality`` compares samples from the prior with held-out images, in features of our own.
    ``evaluate`` gives ``loss`` = −ELBO in nats an image, ``reconstruction``, ``kl``, ``bits_per_dim`` = −ELBO/(D log 2)
    and, where the dataset has judging features and the split enough images, ``own_kid`` and ``own_frechet``.
    """

    terms = ("reconstruction", "kl")
    base = "reconstruction"
    objectives = ("elbo", "sample_quality")
    models = ("vae", "conv_vae")
    quick: ClassVar[Mapping[str, Any]] = {"epochs": 100, "lr": 2e-3}

    def __init__(self, config: Any, data: Any, device: torch.device, **options: Any) -> None:
        super().__init__(config, data, device, **options)
        self.image_shape = data.image_shape
        self.pixels = math.prod(data.image_shape)
        self.network = self._build().to(device)
        self.model = self.network
        self.noise = own_generator(config.seed, "latent")
        self.judge = load_features(data.name, "judge").to(device) if has_features(data.name) else None
        self.probe = self._probe(data.name, self.splits["probe"].images)

    def _build(self) -> VAE | ConvVAE:
        small = self.image_shape[1] < CONVOLUTIONAL_FROM
        name = self.config.model or ("vae" if small else "conv_vae")
        return VAE(self.pixels) if name == "vae" else ConvVAE(self.image_shape)

    def _probe(self, dataset: str, images: Tensor) -> held_out | sample_quality:
        seed = own_generator(self.config.seed, "probe").initial_seed()
        if self.config.objective != "sample_quality":
            return held_out(self._objective, images, batch_size=PROBE_BATCH, model=self.model, seed=seed)
        features = load_features(dataset, "probe").to(self.device).features
        return sample_quality(
            self.generate,
            images.float() / 255,
            features,
            reconstruct=self._reconstruct,
            batch_size=PROBE_BATCH,
            model=self.model,
            seed=seed,
        )

    def _reconstruct(self, images: Tensor, generator: Generator) -> Tensor:
        logits, _, _ = self.model(images.flatten(1), generator)
        return logits.sigmoid().view_as(images)

    def generate(self, count: int, generator: Generator) -> Tensor:
        """Mean images ``[count, C, H, W]`` in 0 to 1 of latents from the prior; the gradient reaches the decoder."""
        latent = torch.randn(count, self.network.latent, generator=generator).to(self.device)
        return self.network.decoder(latent).sigmoid().view(count, *self.image_shape)

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
        quality = self._sample_metrics(split)
        self.model.train()
        means = {name: total / count for name, total in totals.items()}
        loss = sum(means.values())
        return {"loss": loss, **means, "bits_per_dim": bits_per_dim(loss, self.pixels), **quality}

    def _sample_metrics(self, split: str) -> dict[str, float]:
        """As many samples as the split has images, the same latents at every call, against those images."""
        if self.judge is None:
            return {}
        noise = own_generator(self.config.seed, f"samples {split}")
        look = self.judge.features
        batches = [images for images, _ in self.evaluation_batches(split)]
        samples = torch.cat([look(self.generate(len(images), noise)) for images in batches])
        return sample_metrics(samples, torch.cat([look(images.float() / 255) for images in batches]))

    @torch.no_grad()
    def pictures(self) -> Mapping[str, Tensor]:
        """``samples`` from the prior; ``reconstructions``, each to the right of its probe image."""
        noise = own_generator(self.config.seed, "pictures")
        images = self.splits["probe"].images[:SHOWN].float() / 255
        with evaluating(self.model):
            return {
                "samples": self.generate(SHOWN * SHOWN, noise),
                "reconstructions": torch.stack([images, self._reconstruct(images, noise)], 1).flatten(0, 1),
            }

    def state_dict(self) -> dict[str, Any]:
        """The latent noise's generator."""
        return {"noise": self.noise.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self.noise.set_state(state["noise"])
