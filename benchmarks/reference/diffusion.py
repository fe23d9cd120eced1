"""Diffusion in the plane in plain PyTorch: EDM's loss with Adam, for the task `diffusion_2d` to be held against.

    python benchmarks/reference/diffusion.py --seeds 1 2

The data, the network, the schedule and the draws of `adaptive-loss train diffusion_2d --quick --mode customary`, whose
weights make its total EDM's loss; no executor, no terms. So both follow one course, to rounding.

Score errors of seeds 1 and 2, test points, each on noise of its own: here 0.02501 and 0.02185; the task 0.0253 and
0.0208 (`--precision fp32 --seed 1`, `--seed 2`), whose mean is 1.6% below.
"""

from __future__ import annotations

import argparse

import torch
from torch import Generator, Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from adaptive_loss.data.mixture_2d import MixtureDataset, load
from adaptive_loss.models.denoiser_mlp import DenoiserMLP
from adaptive_loss.seeding import own_generator

SIGMA_DATA, BATCH = 0.5, 128


class Denoiser(nn.Module):
    """Karras et al. 2022, table 1."""

    def __init__(self) -> None:
        super().__init__()
        self.network = DenoiserMLP(2)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The clean points expected behind ``[B, 2]`` noisy ones of levels ``[B]``."""
        s = sigma[:, None]
        total = s**2 + SIGMA_DATA**2
        raw = self.network(x / total.sqrt(), sigma.log() / 4)
        return SIGMA_DATA**2 / total * x + s * SIGMA_DATA / total.sqrt() * raw


def draw(count: int, dice: Generator) -> tuple[Tensor, Tensor]:
    """Levels, ln σ ~ N(−1.2, 1.2²) with an eighth of the samples in each eighth of it, and noise."""
    first = torch.randint(8, (), generator=dice)
    share = ((torch.arange(count) + first) % 8 + torch.rand(count, generator=dice, dtype=torch.float64)) / 8
    sigma = (-1.2 + 1.2 * torch.special.ndtri(share.clamp(1e-6, 1 - 1e-6))).exp().float()
    return sigma, torch.randn(count, 2, generator=dice)


def weigh(error: Tensor, sigma: Tensor) -> Tensor:
    """The mean of λ(σ)·‖error‖² a dimension."""
    return ((sigma**2 + SIGMA_DATA**2) / (sigma * SIGMA_DATA) ** 2 * error.square().mean(1)).mean()


def train(data: MixtureDataset, epochs: int, lr: float, seed: int) -> float:
    """The exact error on the test points: λ(σ)·‖D − D*‖², of the running mean of the weights."""
    torch.manual_seed(seed)
    order, dice = own_generator(seed, "order"), own_generator(seed, "noise")
    model, points = Denoiser(), data.train.inputs
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    steps = epochs * (len(points) // BATCH)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3 * lr, total_steps=steps, div_factor=3)
    for _ in range(epochs):
        for rows in torch.randperm(len(points), generator=order).split(BATCH):
            if len(rows) == BATCH:
                sigma, noise = draw(BATCH, dice)
                optimizer.zero_grad()
                weigh(model(points[rows] + sigma[:, None] * noise, sigma) - points[rows], sigma).backward()
                optimizer.step()
                scheduler.step()
                average.update_parameters(model)
    sigma, noise = draw(len(data.test), own_generator(seed, "test"))
    x = data.test.inputs + sigma[:, None] * noise
    with torch.no_grad():
        return float(weigh(average(x, sigma) - data.mixture.denoised(x, sigma), sigma))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--lr", type=float, default=2e-3)
    flags = parser.parse_args()
    for seed in flags.seeds:
        print(f"seed {seed}: score error {train(load(), flags.epochs, flags.lr, seed):.5f}", flush=True)
