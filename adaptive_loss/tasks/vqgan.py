"""A VQ autoencoder with a perceptual and an adversarial loss, the latter switched on in mid-run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from adaptive_loss.events import Event
from adaptive_loss.losses import LossTerms
from adaptive_loss.metrics.features import load_features
from adaptive_loss.metrics.perplexity import codebook_perplexity
from adaptive_loss.metrics.psnr_ssim import psnr, ssim
from adaptive_loss.models.vq_autoencoder import PatchDiscriminator, VQAutoencoder
from adaptive_loss.probes import evaluating, held_out, sample_quality
from adaptive_loss.seeding import own_generator
from adaptive_loss.tasks import tasks
from adaptive_loss.tasks._adversarial import Watch, frozen, hinge, lecam
from adaptive_loss.tasks._sample_metrics import sample_metrics
from adaptive_loss.tasks.base import ImageTask, Opponent
from adaptive_loss.weighting.base import Weighting
from adaptive_loss.weighting.fixed import Fixed
from adaptive_loss.weighting.switch_on import SwitchOn
from adaptive_loss.weighting.vqgan import VQGAN

START = 0.25
"""Share of the run after which the adversarial term is there; the discriminator learns from the first step on."""
RAMP = 0.1
"""Share of the run over which ``--weighting switch_on`` brings it to its full weight."""
ANCHOR_DECAY = 0.99
BETAS = (0.5, 0.9)
PROBE_BATCH = 64
SHOWN = 8


@tasks.register("vqgan")
class VQGANTask(ImageTask):
    """Terms as in Esser et al. (2021), on images in −1 to 1; means over pixels or elements, as published.

    - ``reconstruction`` (base): E|x − x̂|, a pixel.
    - ``perceptual``: E(f(x) − f(x̂))² in the standardised features of a classifier of our own.
    - ``codebook``: E(e − sg z)² moves the codes, ``commitment``: E(z − sg e)² the encoder.
    - ``adversarial``: −E D(x̂), absent in the first quarter of the run.
    - ``hinge`` of the discriminator: ½(E max(0, 1 − D(x)) + E max(0, 1 + D(x̂))).
    - ``lecam`` of the discriminator: E(D(x) − α_F)² + E(D(x̂) − α_R)², α running means of D(x̂) and D(x).

    The objective ``sample_quality`` compares reconstructions of held-out images with other held-out images in the
    probe's features; ``fidelity`` is reconstruction + perceptual on held-out images. ``--weighting vqgan`` weighs the
    adversarial term alone, at the decoder's last layer; ``--weighting encodec`` balances at the output; ``--weighting
    switch_on`` ramps the adversarial term in, caps its share and takes it back if the reconstruction worsens.

    ``evaluate`` gives ``loss``, the kernel distance of reconstructions and the split's images in features that the
    probe does not use (``own_kid``, beside ``own_frechet``); ``reconstruction``, ``psnr`` (decibels), ``ssim``,
    ``perplexity`` of the codebook; and, for the select split, ``switch_on_jump``: how far above its last value before
    the adversarial term came the reconstruction has been at the end of any epoch since, relative to that value.
    """

    terms = ("reconstruction", "perceptual", "codebook", "commitment", "adversarial")
    base = "reconstruction"
    steady = False
    opponents = (Opponent("discriminator", ("hinge", "lecam")),)
    datasets = ("digits", "fashion_mnist")
    customary: ClassVar[Mapping[str, float]] = {"commitment": 0.25, "adversarial": 0.1, "lecam": 0.01}
    # The objective's gradient passes the codes as if they were not there (straight through). To a look-ahead what ties
    # latents and codes only takes room from other terms: the law lowered commitment a hundredfold, to a third of the
    # codes in use and 3 dB less.
    pinned = ("codebook", "commitment")
    objectives = ("sample_quality", "fidelity")
    models = ("vq_autoencoder",)
    quick: ClassVar[Mapping[str, Any]] = {"epochs": 60, "batch_size": 64}
    smoke: ClassVar[Mapping[str, Any]] = {"epochs": 4, "batch_size": 64, "subset": 500}

    def __init__(self, config: Any, data: Any, device: torch.device, **options: Any) -> None:
        super().__init__(config, data, device, **options)
        self.network = VQAutoencoder(data.image_shape).to(device)
        self.model = self.network
        self.discriminator = PatchDiscriminator(data.image_shape[0]).to(device)
        self.perceive = load_features(data.name, "probe").to(device).features
        self.judge = load_features(data.name, "judge").to(device).features
        steps = config.epochs * (len(self.splits["train"]) // config.batch_size)
        self.step, self.start, self.ramp = 0, round(START * steps), round(RAMP * steps)
        self.anchors = torch.zeros(2, device=device)
        self.watch = Watch("discriminator")
        self.before, self.worst = math.nan, math.nan
        self.probe = self._probe()

    def _probe(self) -> held_out | sample_quality:
        images = unit(self.splits["probe"].images)
        seed = own_generator(self.config.seed, "probe").initial_seed()
        if self.config.objective == "fidelity":
            return held_out(self._fidelity, images, batch_size=PROBE_BATCH, model=self.model, seed=seed)

        def reconstructed(count: int, generator: Generator) -> Tensor:
            rows = torch.randperm(len(images), generator=generator)[:count].to(self.device)
            return self._reconstruct(images[rows])

        return sample_quality(reconstructed, images, self.perceive, batch_size=PROBE_BATCH, model=self.model, seed=seed)

    def _reconstruct(self, images: Tensor) -> Tensor:
        """Images in 0 to 1 → theirs; the gradient reaches encoder, decoder and codes."""
        return (self.network(2 * images - 1, to_codes=True)[0] + 1) / 2

    def _fidelity(self, images: Tensor) -> Tensor:
        made = self._reconstruct(images)
        return 2 * (made - images).abs().mean() + F.mse_loss(self.perceive(made), self.perceive(images))

    def weighting(self, name: str) -> Weighting:
        """``vqgan`` and ``switch_on`` are about the adversarial term."""
        count = len(self.terms)
        if name not in ("vqgan", "switch_on"):
            return super().weighting(name)
        if "adversarial" not in self.wanted:
            return Fixed(count)
        if name == "vqgan":
            return VQGAN(count, only=("adversarial",))
        return SwitchOn(count, "adversarial", at=self.start, ramp=self.ramp, share=0.3, bound=1.5)

    def opponent(self, name: str) -> nn.Module:
        """The discriminator."""
        return self.discriminator

    def opponent_losses(self, name: str, rows: Tensor) -> LossTerms:
        """The discriminator's wanted terms."""
        images = self._images(rows)
        with torch.no_grad():
            made = self.network(images)[0]
        real, fake = self.discriminator(images).float(), self.discriminator(made).float()
        self.watch.see(real, fake)
        losses = {"hinge": hinge(real, fake)}
        if "lecam" in self.wanted:
            losses["lecam"] = lecam(real, fake, self.anchors)
            means = torch.stack([real.detach().mean(), fake.detach().mean()])
            self.anchors = self.anchors.lerp(means, 1 - ANCHOR_DECAY)
        return losses

    def losses(self, rows: Tensor) -> LossTerms:
        """The autoencoder's wanted terms; the adversarial one is absent before its time."""
        images = self._images(rows)
        made, latent, code = self.network(images)
        losses = {"reconstruction": (made - images).abs().mean()}
        if "perceptual" in self.wanted:
            wanted, seen = (self.perceive((part + 1) / 2) for part in (images, made.float()))
            losses["perceptual"] = F.mse_loss(seen, wanted)
        losses["codebook"] = F.mse_loss(code, latent.detach())
        losses["commitment"] = F.mse_loss(latent, code.detach())
        if "adversarial" in self.wanted and self.step >= self.start:
            with frozen(self.discriminator):
                losses["adversarial"] = -self.discriminator(made).float().mean()
        self.tap = [made] if self.config.weighting == "encodec" else [self.network.last.weight]
        return {name: loss for name, loss in losses.items() if name in self.wanted}

    def _images(self, rows: Tensor) -> Tensor:
        return 2 * unit(self.splits["train"].images[rows.to(self.device)]) - 1

    def optimizer(self, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        """Adam with the momentum of the paper's code, for either network."""
        return torch.optim.Adam(parameters, lr=self.config.lr, betas=BETAS)

    def after_step(self) -> list[Event]:
        """Count, and say where the discriminator has collapsed."""
        self.step += 1
        return self.watch.events()

    @property
    def collapsed(self) -> dict[str, str]:
        """The discriminator, with the reason, where it has collapsed."""
        return {} if self.watch.collapsed is None else {"discriminator": self.watch.collapsed}

    @torch.no_grad()
    def evaluate(self, split: str) -> Mapping[str, float]:
        """How like the originals the reconstructions are, one by one and as a whole."""
        parts = []
        with evaluating(self.model):
            for images, _ in self.evaluation_batches(split):
                parts.append((unit(images), *self._look(unit(images))))
        originals, made, indices = (torch.cat(part) for part in zip(*parts, strict=True))
        reconstruction = 2 * float((made - originals).abs().mean())
        made = made.clamp(0, 1)
        distances = sample_metrics(self.judge(made), self.judge(originals))
        return {
            "loss": distances["own_kid"],
            "reconstruction": reconstruction,
            "psnr": float(psnr(made, originals).mean()),
            "ssim": float(ssim(made, originals).mean()),
            "perplexity": codebook_perplexity(indices, len(self.network.codebook)),
            **distances,
            **({"switch_on_jump": self._jump(reconstruction)} if split == "select" else {}),
        }

    def _look(self, images: Tensor) -> tuple[Tensor, Tensor]:
        made, latent, _ = self.network(2 * images - 1)
        return (made + 1) / 2, self.network.nearest(latent)

    def _jump(self, reconstruction: float) -> float:
        if self.step <= self.start:
            self.before = reconstruction
        else:
            self.worst = max(reconstruction, self.worst) if self.worst == self.worst else reconstruction
        rise = self.worst / self.before - 1
        return max(rise, 0.0) if rise == rise else 0.0

    @torch.no_grad()
    def pictures(self) -> Mapping[str, Tensor]:
        """``reconstructions``, each to the right of its probe image."""
        images = unit(self.splits["probe"].images[:SHOWN])
        with evaluating(self.model):
            return {"reconstructions": torch.stack([images, self._look(images)[0]], 1).flatten(0, 1)}

    def state_dict(self) -> dict[str, Any]:
        """Steps, anchors, the watch, and what the jump is measured by."""
        counts = {"step": self.step, "before": self.before, "worst": self.worst}
        return {**counts, "anchors": self.anchors, "watch": self.watch.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self.step, self.before, self.worst = state["step"], state["before"], state["worst"]
        self.anchors = state["anchors"].to(self.device)
        self.watch.load_state_dict(state["watch"])


def unit(images: Tensor) -> Tensor:
    """Bytes as floats in 0 to 1."""
    return images.float() / 255
