"""Denoising points of a plane, noise buckets as terms and no base, judged by the exact error of the score."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor

from adaptive_loss.meta.families import families
from adaptive_loss.meta.families.base import Family, Run, Tensors, between, perceptron, whole
from adaptive_loss.models._edm import SIGMA_DATA, EDMDenoiser

BUCKETS, EACH = 5, 16
LOW, HIGH = math.log(0.03), math.log(3.0)
JUDGED = 60


class Denoiser(Run):
    """EDM's preconditioning around a perceptron of x and log σ."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.network = perceptron(3, hidden, hidden, 2)

    def denoise(self, noisy: Tensor, sigma: Tensor) -> Tensor:
        """[B, 2] the clean points behind noisy ones."""
        return EDMDenoiser(lambda x, level: self.network(torch.cat([x, level[:, None]], dim=1)))(noisy, sigma)  # type: ignore[arg-type]

    def errors(self, clean: Tensor, draw: Tensors) -> Tensor:
        """[buckets] λ(σ)-weighted squared errors, whose scale is about 1 at every σ."""
        sigma = draw["sigma"]
        off = self.denoise(clean + sigma[:, None] * draw["noise"], sigma) - clean
        return (loss_weight(sigma)[:, None] * off.square()).mean(1).unflatten(0, (BUCKETS, -1)).mean(1)

    def losses(self, data: Tensors, draw: Tensors) -> Tensor:
        """[buckets]."""
        return self.errors(data["x"][draw["rows"]], draw)

    def objective(self, data: Tensors, draw: Tensors) -> Tensor:
        """Mean over the buckets, on held-out points."""
        return self.errors(data["probe_x"][draw["rows"]], draw).mean()

    def judged(self, data: Tensors) -> Tensor:
        """Mean squared error against the best denoiser there is, weighted as the losses are."""
        noisy, sigma = data["judge_x"], data["judge_sigma"]
        off = self.denoise(noisy, sigma) - best(noisy, sigma, data["centres"], data["width"])
        return (loss_weight(sigma)[:, None] * off.square()).mean()


def loss_weight(sigma: Tensor) -> Tensor:
    """λ(σ) = (σ² + σd²)/(σ·σd)² of Karras et al. 2022."""
    return (sigma.square() + SIGMA_DATA**2) / (sigma * SIGMA_DATA).square()


def best(noisy: Tensor, sigma: Tensor, centres: Tensor, width: Tensor) -> Tensor:
    """E[x₀ | x] of a mixture of Gaussians of one width with equal weights."""
    variance = (sigma.square() + width**2)[:, None]
    part = torch.softmax(-(noisy[:, None] - centres).square().sum(-1) / (2 * variance), dim=1)
    mean = part @ centres
    return mean + width**2 / variance * (noisy - mean)


@families.register("diffusion")
class DiffusionFamily(Family):
    """Mixtures of three to eight Gaussians."""

    name = "diffusion"
    terms = tuple(f"bucket_{i}" for i in range(BUCKETS))
    customary = (1.0,) * BUCKETS

    def __init__(self, dice: Generator) -> None:
        super().__init__(dice)
        self.modes = whole(3, 8, dice)

    def run(self) -> Run:
        """A denoiser."""
        return Denoiser(self.hidden)

    def data(self, dice: Generator) -> dict[str, Tensor]:
        """A mixture that is drawn once a run, and points of it."""
        centres = torch.randn(self.modes, 2, generator=dice)
        centres = SIGMA_DATA * centres / centres.square().mean().sqrt()
        width = torch.tensor(between(0.02, 0.1, dice))
        parts = {"x": self.n_train, "probe_x": 150, "judge_x": BUCKETS * JUDGED}
        data = {name: self._points(count, centres, width, dice) for name, count in parts.items()}
        sigma, noise = levels(1, JUDGED, dice)
        data["judge_x"] = data["judge_x"] + sigma[0][:, None] * noise[0]
        return {**data, "judge_sigma": sigma[0], "centres": centres, "width": width}

    def _points(self, count: int, centres: Tensor, width: Tensor, dice: Generator) -> Tensor:
        which = torch.randint(self.modes, (count,), generator=dice)
        return centres[which] + width * torch.randn(count, 2, generator=dice)

    def draws(self, steps: int, dice: Generator) -> dict[str, Tensor]:
        """Rows, levels and noise."""
        sigma, noise = levels(steps, EACH, dice)
        rows = torch.randint(self.n_train, sigma.shape, generator=dice)
        return {"rows": rows, "sigma": sigma, "noise": noise}

    def looks(self, count: int, dice: Generator) -> dict[str, Tensor]:
        """Rows, levels and noise."""
        sigma, noise = levels(count, EACH, dice)
        return {"rows": torch.randint(150, sigma.shape, generator=dice), "sigma": sigma, "noise": noise}


def levels(count: int, each: int, dice: Generator) -> tuple[Tensor, Tensor]:
    """[count, buckets·each] σ, log-uniform within each bucket, and noise [count, buckets·each, 2]."""
    within = torch.rand(count, BUCKETS, each, generator=dice)
    place = (within + torch.arange(BUCKETS)[:, None]) / BUCKETS
    sigma = (LOW + (HIGH - LOW) * place).exp().flatten(1)
    return sigma, torch.randn(*sigma.shape, 2, generator=dice)
