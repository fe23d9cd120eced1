"""What diffusion models of 16×16 images share: the images, the U-Net, samples and how they are judged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from statistics import fmean
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from adaptive_loss.metrics.features import has_features, load_features
from adaptive_loss.models._edm import SIGMA_DATA
from adaptive_loss.probes import held_out, sample_quality
from adaptive_loss.seeding import own_generator
from adaptive_loss.tasks._diffusion import Denoiser, DiffusionTask, by_bucket, sample, weighted_errors
from adaptive_loss.tasks._sample_metrics import sample_metrics
from adaptive_loss.tasks.base import EVALUATION_BATCH, ImageTask

SIDE = 16
STEPS, PROBE_STEPS = 8, 3
"""Of the sampler: to be measured and looked at, and inside the probe, where all of them are differentiated."""
PROBE_BATCHES = 2
LEAST = 1 / 255
"""Deviation of a channel, so that a constant one can be divided by."""
PICTURES = 64


class ImageDiffusion(DiffusionTask, ImageTask):
    """A denoiser of images at 16×16.

    Pixels are shifted by the training images' mean and scaled to deviation 0.5. ``sample_quality`` compares samples of
    a three-step solver with held-out images, in features of our own. ``evaluate`` gives ``loss``, EDM's loss, its
    parts ``denoising_k`` by bucket, which are 1 for a network that has learned nothing, and where the dataset has
    judging features and the split enough images, ``own_kid`` and ``own_frechet`` of samples of an eight-step solver,
    as many as the split has images and no more than ``--subset`` says.
    Features are of the dataset's own size: samples are resized to it, and so are the images, from 16×16.
    """

    objectives = ("denoising", "sample_quality")
    models = ("small_unet",)
    quick: ClassVar[Mapping[str, Any]] = {"epochs": 15, "batch_size": 32}
    smoke: ClassVar[Mapping[str, Any]] = {"epochs": 1, "subset": 200, "batch_size": 32}
    probe_batch = 64

    def __init__(self, config: Any, data: Any, device: torch.device, **options: Any) -> None:
        self.dataset, self.image_shape = data.name, data.image_shape
        super().__init__(config, data, device, **options)
        self.judge = load_features(data.name, "judge").to(device) if has_features(data.name) else None

    def prepare(self, split: str) -> Tensor:
        """Images at 16×16, of deviation σd about 0."""
        shift, scale = self._moments
        return (self._small(split) - shift) / scale

    @cached_property
    def _moments(self) -> tuple[Tensor, Tensor]:
        """Mean of the training pixels and their deviation in σd, at 16×16, ``[C, 1, 1]`` each."""
        train = self._small("train")
        deviation = train.std(dim=(0, 2, 3), keepdim=True)[0]
        return train.mean(dim=(0, 2, 3), keepdim=True)[0], deviation.clamp_min(LEAST) / SIGMA_DATA

    def _small(self, split: str) -> Tensor:
        return resized(self.splits[split].images.float() / 255, (SIDE, SIDE))

    def pixels(self, examples: Tensor) -> Tensor:
        """Examples as images in 0 to 1."""
        shift, scale = self._moments
        return (examples * scale + shift).clamp(0, 1)

    def make_probe(self, seed: int) -> held_out | sample_quality:
        """The objective that was asked for, on the probe split."""
        if self.config.objective != "sample_quality":
            return super().make_probe(seed)
        return sample_quality(
            lambda count, generator: self.generate(count, generator, self.model, PROBE_STEPS),
            self.pixels(self.examples["probe"]),
            self.looking(load_features(self.dataset, "probe").to(self.device).features),
            batch_size=self.probe_batch,
            batches=PROBE_BATCHES,
            model=self.model,
            seed=seed,
        )

    def looking(self, features: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """Features of 16×16 images, resized to what the feature network takes."""
        return lambda images: features(resized(images, self.image_shape[1:]))

    def generate(self, count: int, generator: Generator, denoiser: Denoiser, steps: int = STEPS) -> Tensor:
        """Samples ``[count, C, 16, 16]`` in 0 to 1; the gradient reaches the denoiser."""
        noise = torch.randn(count, self.image_shape[0], SIDE, SIDE, generator=generator)
        return self.pixels(sample(denoiser, noise.to(self.device), steps))

    @torch.no_grad()
    def evaluate(self, split: str) -> Mapping[str, float]:
        """EDM's loss on a whole split, by bucket, and what samples look like beside it."""
        errors, buckets = [], []
        for part in self.denoised(split):
            errors.append(weighted_errors(part.found, part.clean, part.sigma))
            buckets.append(part.bucket)
        found = by_bucket("denoising", torch.cat(errors), torch.cat(buckets))
        return {"loss": fmean(found.values()), **found, **self._sample_metrics(split)}

    def _sample_metrics(self, split: str) -> dict[str, float]:
        """As many samples as images, from the same noise at every call, against those images."""
        if self.judge is None:
            return {}
        noise, look = own_generator(self.config.seed, f"samples {split}"), self.looking(self.judge.features)
        # The subset bounds the test's images too: samples of all of them would be most of a short run.
        parts = self.examples[split][: self.config.subset].split(EVALUATION_BATCH)
        samples = torch.cat([look(self.generate(len(part), noise, self.average)) for part in parts])
        return sample_metrics(samples, torch.cat([look(self.pixels(part)) for part in parts]))

    @torch.no_grad()
    def pictures(self) -> Mapping[str, Tensor]:
        """Samples, from the same noise at every call."""
        return {"samples": self.generate(PICTURES, own_generator(self.config.seed, "pictures"), self.average)}


def resized(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Images ``[N, C, H, W]`` at another size, as means of the pixels that meet: doubled and halved, none changes."""
    return F.interpolate(images, size=size, mode="area")
