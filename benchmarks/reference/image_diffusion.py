"""Diffusion of digits at 16×16 in plain PyTorch, for the tasks `diffusion` and `diffusion_aligned` to be held against.

    python benchmarks/reference/image_diffusion.py --seeds 1 2
    python benchmarks/reference/image_diffusion.py --seeds 1 2 --alignment 0.5
    adaptive-loss train diffusion --quick --mode customary --seed 1 --output-dir DIR, and so on

Data, networks and draws are the tasks', the loop and the losses are not: both follow one course, to rounding.

EDM's loss on the test images: 0.1861 and 0.1866 here for seeds 1 and 2, 0.1831 by the task for seed 1 (fp32,
commit ac4ab20), 1.6% below. Its seed 2 and `diffusion_aligned` have been compared
at the size of tests/test_references.py alone.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from adaptive_loss.data.base import Dataset
from adaptive_loss.data.digits import load
from adaptive_loss.metrics.features import load_features
from adaptive_loss.models.small_unet import SmallUNet
from adaptive_loss.seeding import own_generator

EPOCHS, BATCH, LR, PEAK, DECAY, SIGMA_DATA = 15, 32, 1e-3, 3.0, 0.99, 0.5
FEATURES = 32


class Denoiser(nn.Module):
    """Karras et al. 2022, table 1; a projection of the hidden features where they are to be aligned."""

    def __init__(self, aligned: bool) -> None:
        super().__init__()
        self.network = SmallUNet(1)
        wide = (self.network.hidden_width, FEATURES, FEATURES)
        layers = (nn.Linear(*wide[:2]), nn.SiLU(), nn.Linear(*wide[1:])) if aligned else ()
        self.projection = nn.Sequential(*layers)

    def forward(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """The clean images expected behind ``[B, 1, 16, 16]`` of levels ``[B]``, and the projection."""
        s = sigma[:, None, None, None]
        total = s**2 + SIGMA_DATA**2
        raw, hidden = self.network.with_hidden(x / total.sqrt(), sigma.log() / 4)
        found = SIGMA_DATA**2 / total * x + s * SIGMA_DATA / total.sqrt() * raw
        return found, self.projection(hidden.mean((2, 3)))


def draw(images: Tensor, dice: Generator) -> tuple[Tensor, Tensor]:
    """Levels, ln σ ~ N(−1.2, 1.2²) with an eighth of the samples in each eighth of it, and noise."""
    count, first = len(images), torch.randint(8, (), generator=dice)
    share = ((torch.arange(count) + first) % 8 + torch.rand(count, generator=dice, dtype=torch.float64)) / 8
    sigma = (-1.2 + 1.2 * torch.special.ndtri(share.clamp(1e-6, 1 - 1e-6))).exp().float()
    return sigma, torch.randn(images.shape, generator=dice)


def losses(model: nn.Module, clean: Tensor, dice: Generator) -> tuple[Tensor, Tensor]:
    """EDM's loss on a batch, and the projected features."""
    sigma, noise = draw(clean, dice)
    s = sigma[:, None, None, None]
    found, projected = model(clean + s * noise, sigma)
    weight = (s**2 + SIGMA_DATA**2) / (s * SIGMA_DATA) ** 2
    return (weight * (found - clean) ** 2).mean(), projected


def train(data: Dataset, seed: int, alignment: float = 0.0, epochs: int = EPOCHS) -> float:
    """EDM's loss on the test images, of the running mean of the weights."""
    torch.manual_seed(seed)
    order, dice = own_generator(seed, "order"), own_generator(seed, "noise")
    small = {name: doubled(getattr(data, name).images) for name in ("train", "test")}
    mean, scale = small["train"].mean(), small["train"].std() / SIGMA_DATA
    clean, wished = (small["train"] - mean) / scale, load_features("digits", "probe").features(data.train.images / 255)
    model, steps = Denoiser(alignment > 0), len(clean) // BATCH
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK * LR, total_steps=epochs * steps, div_factor=PEAK)
    for _ in range(epochs):
        for rows in torch.randperm(len(clean), generator=order).split(BATCH)[:steps]:
            optimizer.zero_grad()
            loss, projected = losses(model, clean[rows], dice)
            if alignment:
                loss = loss + alignment * (1 - F.cosine_similarity(projected, wished[rows]).mean())
            loss.backward()
            optimizer.step()
            schedule.step()
            average.update_parameters(model)
    with torch.no_grad():
        return float(losses(average, (small["test"] - mean) / scale, own_generator(seed, "evaluate test"))[0])


def doubled(images: Tensor) -> Tensor:
    """8×8 bytes → 16×16 in 0 to 1, each pixel four times."""
    return (images.float() / 255).repeat_interleave(2, 2).repeat_interleave(2, 3)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--alignment", type=float, default=0.0)
    flags = parser.parse_args()
    torch.set_num_threads(1)
    for seed in flags.seeds:
        print(f"seed {seed}: EDM's loss {train(load(), seed, flags.alignment):.5f}", flush=True)
