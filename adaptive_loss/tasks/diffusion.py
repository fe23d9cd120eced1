"""A diffusion model of 16×16 images, with noise levels as terms."""

from __future__ import annotations

import torch
from torch import nn

from adaptive_loss.models._edm import EDMDenoiser
from adaptive_loss.models.small_unet import SmallUNet
from adaptive_loss.tasks import tasks
from adaptive_loss.tasks._image_diffusion import ImageDiffusion


@tasks.register("diffusion")
class Diffusion(ImageDiffusion):
    """A U-Net; :class:`~adaptive_loss.tasks._diffusion.DiffusionTask` has the terms, its other parent the metrics."""

    def build(self) -> nn.Module:
        """The denoiser; every term's gradient passes its last layer."""
        network = SmallUNet(self.image_shape[0])
        self.tap = network.output.weight
        return EDMDenoiser(network).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
