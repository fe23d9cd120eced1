"""A generative adversarial network on images of 16×16."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from adaptive_loss.metrics.features import load_features
from adaptive_loss.metrics.prdc import precision_recall_density_coverage
from adaptive_loss.models.conv_gan import SIDE, ImageCritic, ImageGenerator
from adaptive_loss.probes import sample_quality
from adaptive_loss.seeding import own_generator
from adaptive_loss.tasks import tasks
from adaptive_loss.tasks._gan import AdversarialTask
from adaptive_loss.tasks._sample_metrics import sample_metrics
from adaptive_loss.tasks.base import ImageTask

PROBE_BATCH = 64
SHOWN = 64
NEIGHBOURS = 5
COLLAPSED = 0.1
"""Coverage below which samples count as collapsed."""


@tasks.register("gan")
class ImageGAN(AdversarialTask, ImageTask):
    """Convolutions on 16×16 images: ``adversarial`` (base), ``feature_matching``; critic: ``logistic``, ``r1``.

    Digits get a rim of 4 black pixels; Fashion-MNIST is scaled down. For the features that compare images the rim is
    cut off again, or the image scaled back, for samples and data alike.

    The customary weight of ``r1`` is γ = 0.0002·16²/B of Karras et al. (2020) at the default batch of B = 128.

    ``evaluate`` gives ``loss``, the kernel distance of as many samples as the split has images in features that the
    probe does not use (``own_kid``, beside ``own_frechet``); ``coverage``, the share of the images in whose
    neighbourhood (of 5) a sample falls; and ``collapsed``, 1 where that is below a tenth, else 0.
    """

    datasets = ("digits", "fashion_mnist")
    models = ("conv_gan",)
    customary: ClassVar[Mapping[str, float]] = {"feature_matching": 0.0, "r1": 0.0004}
    quick: ClassVar[Mapping[str, Any]] = {"epochs": 60}
    smoke: ClassVar[Mapping[str, Any]] = {"epochs": 3, "subset": 500}

    def __init__(self, config: Any, data: Any, device: torch.device, **options: Any) -> None:
        super().__init__(config, data, device, **options)
        channels, self.side, _ = data.image_shape
        self.set_up(ImageGenerator(channels), ImageCritic(channels))
        self.judge = load_features(data.name, "judge").to(device).features
        self.probe = sample_quality(
            lambda count, generator: self._native(self.generate(count, generator)),
            self._native(self._small(self.splits["probe"].images)),
            load_features(data.name, "probe").to(device).features,
            batch_size=PROBE_BATCH,
            model=self.model,
            seed=own_generator(config.seed, "probe").initial_seed(),
        )

    def _small(self, images: Tensor) -> Tensor:
        """Bytes ``[N, C, H, W]`` → ``[N, C, 16, 16]`` in −1 to 1."""
        return 2 * resized(images.float() / 255, SIDE) - 1

    def _native(self, images: Tensor) -> Tensor:
        """Back from :meth:`_small` to 0 to 1 at the data's own size."""
        return resized((images + 1) / 2, self.side)

    def real(self, rows: Tensor) -> Tensor:
        """Training images."""
        return self._small(self.splits["train"].images[rows.to(self.device)])

    @torch.no_grad()
    def evaluate(self, split: str) -> Mapping[str, float]:
        """Distances and coverage of the averaged generator's samples."""
        images = [batch for batch, _ in self.evaluation_batches(split)]
        reference = torch.cat([self.judge(self._native(self._small(batch))) for batch in images])
        samples = self.samples(len(reference), f"samples {split}")
        found = torch.cat([self.judge(self._native(part)) for part in samples.split(len(images[0]))])
        distances = sample_metrics(found, reference)
        coverage = precision_recall_density_coverage(found, reference, NEIGHBOURS)["coverage"]
        return {
            "loss": distances["own_kid"],
            **distances,
            "coverage": coverage,
            "collapsed": float(coverage < COLLAPSED),
        }

    def pictures(self) -> Mapping[str, Tensor]:
        """``samples`` of the averaged generator."""
        return {"samples": (self.samples(SHOWN, "pictures") + 1) / 2}


def resized(images: Tensor, side: int) -> Tensor:
    """Square images at another side: a difference of up to 8 pixels is a black rim put on or cut off, else scaled."""
    rim = (side - images.shape[-1]) // 2
    if abs(rim) <= 4:
        return F.pad(images, (rim, rim, rim, rim))
    return F.interpolate(images, (side, side), mode="bilinear", antialias=True)
