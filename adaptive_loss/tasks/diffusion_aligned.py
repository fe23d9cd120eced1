"""A diffusion model of images whose hidden features are held to a classifier's, until that no longer helps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptive_loss.losses import LossTerms
from adaptive_loss.metrics.features import load_features
from adaptive_loss.models._edm import EDMDenoiser
from adaptive_loss.models.small_unet import SmallUNet
from adaptive_loss.tasks import tasks
from adaptive_loss.tasks._diffusion import noisy, weighted_errors
from adaptive_loss.tasks._image_diffusion import ImageDiffusion
from adaptive_loss.tasks.base import EVALUATION_BATCH


def misalignment(found: Tensor, wanted: Tensor) -> Tensor:
    """1 − cos(found, wanted), mean over the batch: 0 to 2. ``[B, D]``, ``[B, D]`` → 0-dim."""
    return (1 - F.cosine_similarity(found.float(), wanted, dim=1)).mean()


class AlignedDenoiser(nn.Module):
    """A denoiser, and a projection of what its U-Net holds at its lowest resolution.

    Args:
        network: the U-Net.
        features: D, size of the projection.
    """

    def __init__(self, network: SmallUNet, features: int) -> None:
        super().__init__()
        self.denoiser = EDMDenoiser(network)
        width = network.hidden_width
        self.projection = nn.Sequential(nn.Linear(width, features), nn.SiLU(), nn.Linear(features, features))

    @property
    def unet(self) -> SmallUNet:
        """The network behind the preconditioning."""
        assert isinstance(self.denoiser.network, SmallUNet)
        return self.denoiser.network

    def forward(self, noisy: Tensor, sigma: Tensor) -> Tensor:
        """The clean images expected behind noisy ones."""
        return self.denoiser(noisy, sigma)

    def both(self, noisy: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """The same, and ``[B, D]``."""
        raw, hidden = self.unet.with_hidden(*self.denoiser.inputs(noisy, sigma))
        return self.denoiser.combine(noisy, sigma, raw), self.projection(hidden.mean((2, 3)))


@tasks.register("diffusion_aligned")
class AlignedDiffusion(ImageDiffusion):
    """Representation alignment (Yu et al. 2025, "Representation Alignment for Generation", eq. 8), an image at a time.

    - ``denoising`` (base): EDM's loss, E[λ(σ)·‖D(x; σ) − y‖²], a mean over pixels.
    - ``alignment``: 1 − cos between the projected hidden features of the noisy image and a frozen classifier's of the
      clean one. It helps early and harms late; ``--weighting wind_down`` stops it for good once its gradient has
      opposed the base's, at the hidden layer, for 20 steps.

    The classifier is the one of ``sample_quality``; samples are judged by another, and measured as in ``diffusion``.
    """

    terms = ("denoising", "alignment")
    base = "denoising"
    bucket_rule = None
    datasets = ("digits", "fashion_mnist")
    customary: ClassVar[Mapping[str, float]] = {"denoising": 1.0, "alignment": 0.5}
    rule_options: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "a term": {"term": "alignment"},
        "a sign": {"opposed": 20, "decay": 0.0},
    }

    def __init__(self, config: Any, data: Any, device: torch.device, **options: Any) -> None:
        super().__init__(config, data, device, **options)
        look = self.looking(load_features(data.name, "probe").to(device).features)
        self.wished = torch.cat([look(self.pixels(part)) for part in self.examples["train"].split(EVALUATION_BATCH)])

    def build(self) -> nn.Module:
        """The denoiser with its projection; both terms pass the U-Net's lowest block."""
        network = SmallUNet(self.image_shape[0])
        self.tap = network.lowest.second.weight
        self.network = AlignedDenoiser(network, len(load_features(self.dataset, "probe").feature_mean))
        return self.network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    def losses(self, rows: Tensor) -> LossTerms:
        """The wanted terms on one batch."""
        rows = rows.to(self.device)
        clean = self.examples["train"][rows]
        sigma, _, noise = self.draw(clean, self.noise)
        found, projected = self.network.both(noisy(clean, sigma, noise), sigma)
        terms = {
            "denoising": weighted_errors(found, clean, sigma).mean(),
            "alignment": misalignment(projected, self.wished[rows]),
        }
        return {name: loss for name, loss in terms.items() if name in self.wanted}
