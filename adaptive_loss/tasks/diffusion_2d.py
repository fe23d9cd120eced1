"""A diffusion model of points in the plane, whose exact score is known."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any, ClassVar

import torch
from torch import Tensor

from adaptive_loss.data.mixture_2d import MixtureDataset
from adaptive_loss.errors import UsageError
from adaptive_loss.models._edm import EDMDenoiser
from adaptive_loss.models.denoiser_mlp import DenoiserMLP
from adaptive_loss.seeding import own_generator
from adaptive_loss.tasks import tasks
from adaptive_loss.tasks._diffusion import DiffusionTask, by_bucket, sample, weighted_errors
from adaptive_loss.tasks.base import PointTask

SAMPLES, STEPS = 4000, 18
SIDE, REACH = 64, 1.25
"""Pixels of a picture, and the coordinate at its edge."""


@tasks.register("diffusion_2d")
class Diffusion2D(DiffusionTask, PointTask):
    """A denoiser of a mixture of Gaussians; see :class:`~adaptive_loss.tasks._diffusion.DiffusionTask` for the terms.

    ``evaluate`` gives ``score_error_k``, the exact error of the bucket's score: the mean of λ(σ)·‖D − D*‖² with D* the
    mixture's own best denoiser. As ∇log p = (D − x)/σ², that is λ(σ)·σ⁴ times the score's squared error, which itself
    differs by orders of magnitude between levels. ``loss`` is their mean, and ``denoising`` is EDM's loss: 1 for a
    network that has learned nothing, and above 0 for D* too.
    """

    datasets = ("mixture_2d",)
    models = ("denoiser_mlp",)
    quick: ClassVar[Mapping[str, Any]] = {"epochs": 40, "lr": 2e-3}
    smoke: ClassVar[Mapping[str, Any]] = {"epochs": 1, "subset": 2000}
    probe_batch = 1000

    def __init__(self, config: Any, data: Any, device: torch.device, **options: Any) -> None:
        if not isinstance(data, MixtureDataset):
            raise UsageError(
                f"--dataset {config.dataset}: diffusion_2d needs a density that is known, a MixtureDataset"
            )
        self.mixture = data.mixture
        super().__init__(config, data, device, **options)

    def prepare(self, split: str) -> Tensor:
        """The points as they are."""
        return self.splits[split].inputs

    def build(self) -> EDMDenoiser:
        """A multi-layer perceptron."""
        network = DenoiserMLP(self.mixture.means.shape[1])
        self.tap = network.output.weight
        return EDMDenoiser(network)

    @torch.no_grad()
    def evaluate(self, split: str) -> Mapping[str, float]:
        """The exact errors on a whole split."""
        errors, losses, buckets = [], [], []
        for part in self.denoised(split):
            exact = self.mixture.denoised(part.noisy.double(), part.sigma.double())
            errors.append(weighted_errors(part.found, exact, part.sigma))
            losses.append(weighted_errors(part.found, part.clean, part.sigma))
            buckets.append(part.bucket)
        found = by_bucket("score_error", torch.cat(errors), torch.cat(buckets))
        return {"loss": fmean(found.values()), "denoising": float(torch.cat(losses).mean()), **found}

    @torch.no_grad()
    def generate(self, count: int, generator: torch.Generator) -> Tensor:
        """``[count, 2]`` samples of the running mean."""
        noise = torch.randn(count, self.mixture.means.shape[1], generator=generator)
        return sample(self.average, noise.to(self.device), STEPS)

    def pictures(self) -> Mapping[str, Tensor]:
        """How samples are spread over [−1.25, 1.25]², and the test points beside them, ``[1, 1, 64, 64]`` each."""
        samples = self.generate(SAMPLES, own_generator(self.config.seed, "pictures"))
        data = self.examples["test"][:SAMPLES]
        return {"samples": spread(samples.cpu()), "data": spread(data.cpu())}


def spread(points: Tensor) -> Tensor:
    """How many points fall on each pixel, brightest where most do. ``[N, 2]`` → ``[1, 1, 64, 64]`` in 0 to 1."""
    edge = [-REACH, REACH, -REACH, REACH]
    counts = torch.histogramdd(points.flip(1).float(), bins=[SIDE, SIDE], range=edge).hist
    return (counts / counts.max().clamp_min(1)).flip(0).view(1, 1, SIDE, SIDE)
