"""What diffusion models of points and of images share: noise levels in buckets, the terms, the sampler, the task.

In the parametrisation of Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models":
x = y + σn with ln σ ~ N(−1.2, 1.2²), y of deviation σd = 0.5, and a denoiser D(x; σ) of y.
"""

from __future__ import annotations

import itertools
import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from statistics import NormalDist
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from adaptive_loss.buckets import bucket_means
from adaptive_loss.losses import LossTerms
from adaptive_loss.models._edm import SIGMA_DATA
from adaptive_loss.probes import held_out
from adaptive_loss.seeding import own_generator
from adaptive_loss.tasks.base import EVALUATION_BATCH, Task

BUCKETS = 8
LOG_SIGMA = NormalDist(-1.2, 1.2)
LEVELS = tuple(math.exp(LOG_SIGMA.inv_cdf((k + 0.5) / BUCKETS)) for k in range(BUCKETS))
"""σₖ, the median of each bucket; the buckets are equally likely."""
BUCKET_TERMS = tuple(f"bucket_{k}" for k in range(BUCKETS))
EMA_DECAY = 0.99
SIGMA_MIN, SIGMA_MAX, RHO = 0.002, 10.0, 7.0
"""Of the sampler; the paper begins at 80, whose first steps lead few-step samplers nowhere: 10 is twenty σd."""
EDGE = 1e-6
"""Probability cut off at both ends of ln σ, where it would be infinite."""

Denoiser = Callable[[Tensor, Tensor], Tensor]


def edm_weight(sigma: Tensor) -> Tensor:
    """λ(σ) = (σ² + σd²)/(σ·σd)² of Karras et al. 2022: it brings squared errors of D to the unit of the network's."""
    return SIGMA_DATA**-2 + sigma**-2


def stratified_levels(count: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """σ and bucket of ``count`` samples: ln σ ~ N(−1.2, 1.2²), equally many from each bucket, to within one.

    Returns:
        float32 ``[count]`` noise levels, and int64 ``[count]`` buckets in 0 to 7.
    """
    first = int(torch.randint(BUCKETS, (), generator=generator))
    bucket = (torch.arange(count) + first) % BUCKETS
    share = (bucket + torch.rand(count, generator=generator, dtype=torch.float64)) / BUCKETS
    normal = torch.special.ndtri(share.clamp(EDGE, 1 - EDGE))
    return (LOG_SIGMA.mean + LOG_SIGMA.stdev * normal).exp().float(), bucket


def weighted_errors(denoised: Tensor, wanted: Tensor, sigma: Tensor) -> Tensor:
    """λ(σ)·‖D − y‖² an example, a mean over its dimensions. ``[B, …]``, ``[B, …]``, ``[B]`` → ``[B]``."""
    return edm_weight(sigma) * (denoised - wanted).square().flatten(1).mean(1)


def bucket_losses(errors: Tensor, bucket: Tensor) -> dict[str, Tensor]:
    """The terms that are there: bucket k's mean of λ(σ)·‖D − y‖², over λ(σₖ).

    So a term is a squared error of D at its bucket's level, whatever levels its samples have, and with the weights
    λ(σₖ) the total is EDM's own loss, times the number of buckets.

    Args:
        errors: λ(σ)·‖D − y‖², ``[B]``.
        bucket: ``[B]``, on the host, so that nothing waits for the device.
    """
    means = bucket_means(errors, bucket.to(errors.device), BUCKETS).means
    losses = (means / edm_weight(torch.tensor(LEVELS)).to(errors)).unbind()
    return {BUCKET_TERMS[k]: losses[k] for k in sorted(set(bucket.tolist()))}


def sample(denoiser: Denoiser, noise: Tensor, steps: int) -> Tensor:
    """The probability-flow ODE from σ = 10 to 0 by Heun's method (Karras et al. 2022, algorithm 1 and eq. 5).

    Args:
        denoiser: D.
        noise: ``[N, …]``, standard normal.
        steps: of the solver; each asks the denoiser twice, the last one once.
    """
    roots = torch.linspace(SIGMA_MAX ** (1 / RHO), SIGMA_MIN ** (1 / RHO), steps, dtype=torch.float64)
    levels = [*(roots**RHO).tolist(), 0.0]
    x = noise * levels[0]
    for here, there in itertools.pairwise(levels):
        slope = _slope(denoiser, x, here)
        moved = x + (there - here) * slope
        x = x + (there - here) * (slope + _slope(denoiser, moved, there)) / 2 if there > 0 else moved
    return x


def _slope(denoiser: Denoiser, x: Tensor, sigma: float) -> Tensor:
    return (x - denoiser(x, x.new_full((len(x),), sigma))) / sigma


class Denoised(NamedTuple):
    """Examples y, x = y + σn, σ, their buckets, and D(x; σ)."""

    clean: Tensor
    noisy: Tensor
    sigma: Tensor
    bucket: Tensor
    found: Tensor


class DiffusionTask(Task):
    """Denoising, one term a bucket of noise levels: ``bucket_0`` (least noise) to ``bucket_7``.

    None is the base: all are parts of one loss, and what weighs them against each other is λ(σ). Their customary
    weights are EDM's; equal ones leave nearly all of the total to the noisiest buckets. The objective ``denoising`` is
    EDM's loss on the probe split, with levels and noise drawn anew at every call: those of one
    draw could be learned. What is measured is a running mean of the weights.

    A subclass says what the examples are and what is trained.
    """

    terms = BUCKET_TERMS
    base = None
    bucket_rule = "inverse_ema"
    objectives = ("denoising",)
    customary: ClassVar[Mapping[str, float]] = {
        name: SIGMA_DATA**-2 + level**-2 for name, level in zip(BUCKET_TERMS, LEVELS, strict=True)
    }
    rule_options: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "noise levels": {"levels": LEVELS},
        "signal-to-noise ratios": {"levels": tuple(level**-2 for level in LEVELS), "prediction": "x0"},
    }
    probe_batch: ClassVar[int]
    """Examples a call of the probe."""

    def __init__(self, config: Any, data: Any, device: torch.device, **options: Any) -> None:
        super().__init__(config, data, device, **options)
        self.examples = {name: self.prepare(name) for name in ("train", "probe", "select", "test")}
        self.model = self.build().to(device)
        self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY))
        self.noise = own_generator(config.seed, "noise")
        self.probe = self.make_probe(own_generator(config.seed, "probe").initial_seed())

    @abstractmethod
    def prepare(self, split: str) -> Tensor:
        """The clean examples y of a split, ``[N, …]`` on the device, of deviation σd."""

    @abstractmethod
    def build(self) -> nn.Module:
        """The denoiser D(x; σ), untrained."""

    def make_probe(self, seed: int) -> Any:
        """The objective on the probe split."""
        return held_out(
            self._objective, self.examples["probe"], batch_size=self.probe_batch, model=self.model, seed=seed
        )

    def draw(self, clean: Tensor, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Noise levels, buckets (on the host) and noise for examples."""
        sigma, bucket = stratified_levels(len(clean), generator)
        noise = torch.randn(clean.shape, generator=generator)
        return sigma.to(clean.device), bucket, noise.to(clean.device)

    def losses(self, rows: Tensor) -> LossTerms:
        """The wanted buckets' terms on one batch."""
        errors, bucket = self._errors(self.examples["train"][rows.to(self.device)], self.noise)
        terms = bucket_losses(errors, bucket)
        return {name: loss for name, loss in terms.items() if name in self.wanted}

    def _objective(self, clean: Tensor) -> Tensor:
        return self._errors(clean, self.probe.generator)[0].mean()

    def _errors(self, clean: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        """λ(σ)-weighted squared errors of examples under levels and noise from ``generator``, and their buckets."""
        sigma, bucket, noise = self.draw(clean, generator)
        return weighted_errors(self.model(noisy(clean, sigma, noise), sigma), clean, sigma), bucket

    def after_step(self) -> None:
        """Let the running mean follow."""
        self.average.update_parameters(self.model)

    def denoised(self, split: str) -> Iterator[Denoised]:
        """What the running mean makes of a split, in pieces, with the same noise at every call."""
        generator = own_generator(self.config.seed, f"evaluate {split}")
        for clean in self.examples[split].split(EVALUATION_BATCH):
            sigma, bucket, noise = self.draw(clean, generator)
            x = noisy(clean, sigma, noise)
            yield Denoised(clean, x, sigma, bucket, self.average(x, sigma))

    def state_dict(self) -> dict[str, Any]:
        """The noise's generator and the running mean."""
        return {"noise": self.noise.get_state(), "average": self.average.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self.noise.set_state(state["noise"])
        self.average.load_state_dict(state["average"])


def noisy(clean: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """x = y + σn. ``[B, …]``, ``[B]``, ``[B, …]`` → ``[B, …]``."""
    return clean + sigma.view(-1, *[1] * (clean.dim() - 1)) * noise


def by_bucket(name: str, errors: Tensor, bucket: Tensor) -> dict[str, float]:
    """``name_k`` → mean error of bucket k, for those that have an example."""
    found = bucket_means(errors.cpu(), bucket, BUCKETS)
    means = zip(found.means.tolist(), found.present.tolist(), strict=True)
    return {f"{name}_{k}": mean for k, (mean, there) in enumerate(means) if there}
