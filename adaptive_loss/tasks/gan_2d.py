"""A generative adversarial network on a grid of 25 Gaussians, where dropped modes can be counted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from adaptive_loss.data.gaussians_25 import SIDE, SPACING, STD, centres
from adaptive_loss.metrics.fourier_features import FourierFeatures
from adaptive_loss.metrics.kid import kernel_distance
from adaptive_loss.metrics.modes import mode_coverage
from adaptive_loss.models.mlp_gan import PointCritic, PointGenerator
from adaptive_loss.probes import sample_quality
from adaptive_loss.seeding import own_generator
from adaptive_loss.tasks import tasks
from adaptive_loss.tasks._gan import AdversarialTask
from adaptive_loss.tasks.base import PointTask

SCALES = (0.25, 1.0, 4.0)
"""Lengths at which the features see differences: a mode's own width is 0.05, neighbours are 2 apart."""
FEATURES = 128
PROBE_BATCH = 256
SHOWN, BINS = 5_000, 96
EDGE = SPACING * (SIDE // 2) + 1


@tasks.register("gan_2d")
class PointGAN(AdversarialTask, PointTask):
    """Perceptrons on points: ``adversarial`` (base), ``feature_matching``; critic: ``logistic``, ``r1``.

    ``evaluate`` gives ``loss``, the unbiased kernel distance of as many samples as the split has points, in random
    Fourier features that the probe does not use; ``modes`` of 25 that hold a sample within 3σ; ``high_quality``, the
    share of samples within 3σ of a mode; and ``collapsed``, 1 where fewer than 13 modes are covered, else 0.
    """

    datasets = ("gaussians_25",)
    models = ("mlp_gan",)
    precisions = ("fp32",)  # in bf16 a coordinate of 4 has a step of 0.016, a third of a mode's width
    customary: ClassVar[Mapping[str, float]] = {"feature_matching": 0.0, "r1": 0.01}
    quick: ClassVar[Mapping[str, Any]] = {"epochs": 40, "batch_size": 256, "lr": 2e-3}
    smoke: ClassVar[Mapping[str, Any]] = {"epochs": 2, "subset": 1000}

    def __init__(self, config: Any, data: Any, device: torch.device, **options: Any) -> None:
        super().__init__(config, data, device, **options)
        self.set_up(PointGenerator(), PointCritic())
        self.judge = self._features("judge")
        self.probe = sample_quality(
            self.generate,
            self.splits["probe"].inputs,
            self._features("probe"),
            batch_size=PROBE_BATCH,
            batches=1,
            model=self.model,
            seed=own_generator(config.seed, "probe").initial_seed(),
        )

    def _features(self, role: str) -> FourierFeatures:
        # The same in every run, so that distances of two runs can be compared.
        return FourierFeatures(2, SCALES, FEATURES, own_generator(0, f"gan_2d {role} features")).to(self.device)

    def real(self, rows: Tensor) -> Tensor:
        """Training points."""
        return self.splits["train"].inputs[rows.to(self.device)]

    @torch.no_grad()
    def evaluate(self, split: str) -> Mapping[str, float]:
        """Kernel distance and modes of the averaged generator's samples."""
        points = self.splits[split].inputs
        samples = self.samples(len(points), f"samples {split}")
        loss = kernel_distance(self.judge(samples).double(), self.judge(points).double())
        found = mode_coverage(samples, centres().to(self.device), STD)
        return {"loss": float(loss), **found, "collapsed": float(found["modes"] < (SIDE * SIDE + 1) / 2)}

    def pictures(self) -> Mapping[str, Tensor]:
        """``samples``: where the averaged generator's samples fall, beside the training points; white is dense."""
        shown = [self.samples(SHOWN, "pictures"), self.splits["train"].inputs[:SHOWN]]
        return {"samples": torch.stack([density(points) for points in shown])[:, None]}


def density(points: Tensor) -> Tensor:
    """[96, 96] counts of points in the square of side 10 around 0, as a share of the fullest bin, y upwards."""
    bins = ((points + EDGE) / (2 * EDGE) * BINS).floor()
    inside = ((bins >= 0) & (bins < BINS)).all(1)
    x, y = bins[inside].long().unbind(1)
    counts = torch.bincount((BINS - 1 - y) * BINS + x, minlength=BINS * BINS).view(BINS, BINS).float()
    return (counts / counts.max().clamp_min(1)).sqrt()
