"""A plain VAE on the digits, against which `adaptive-loss train vae --quick --mode customary` is checked.

    python benchmarks/reference/vae.py 1 2

Data, network and draws are the task's, the loop is not: so both follow one course, to rounding. −ELBO of the test
images, nats, seeds 1 and 2: 24.1216 and 24.1978 here, and the same four decimals by the task (fp32, commit ac4ab20).
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from adaptive_loss.data.base import Dataset
from adaptive_loss.data.digits import load
from adaptive_loss.models.vae import VAE
from adaptive_loss.seeding import own_generator

EPOCHS, BATCH, LR, PEAK = 100, 128, 2e-3, 3.0


def negative_elbo(model: VAE, pixels: Tensor, noise: Generator) -> Tensor:
    """Reconstruction + KL, nats an image."""
    logits, mean, log_variance = model(pixels, noise)
    reconstruction = F.binary_cross_entropy_with_logits(logits, pixels, reduction="sum")
    kl = -(1 + log_variance - mean**2 - log_variance.exp()).sum() / 2
    return (reconstruction + kl) / len(pixels)


def train(data: Dataset, seed: int, epochs: int = EPOCHS, lr: float = LR) -> float:
    """−ELBO of the test images, nats an image."""
    torch.manual_seed(seed)
    images = data.train.images.flatten(1).float() / 255
    model, order, noise = VAE(images.shape[1]), own_generator(seed, "order"), own_generator(seed, "latent")
    steps = len(images) // BATCH
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK * lr, total_steps=epochs * steps, div_factor=PEAK)
    for _ in range(epochs):
        for rows in torch.randperm(len(images), generator=order).split(BATCH)[:steps]:
            optimizer.zero_grad()
            negative_elbo(model, images[rows], noise).backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        test = data.test.images.flatten(1).float() / 255
        return float(negative_elbo(model, test, own_generator(seed, "evaluate test")))


if __name__ == "__main__":
    torch.set_num_threads(1)
    for given in sys.argv[1:] or ["1", "2"]:
        print(f"seed {given}: {train(load(), int(given)):.4f} nats", flush=True)
