"""Pairs of digits in plain PyTorch, for the task `multitask` to be held against.

    python benchmarks/reference/multitask.py --seeds 1 2

The data, the network, the schedule and the test pairs of `adaptive-loss train multitask --quick --mode customary`; no
executor, and initial weights and training pairs of its own.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptive_loss.data.digits import load
from adaptive_loss.seeding import own_generator

EPOCHS, BATCH, LR, PEAK, SHIFT, FEATURES = 30, 50, 2e-3, 3.0, 4, 64
RECONSTRUCTION = 0.0005
FLAT = 32 * 3 * 3


class Network(nn.Module):
    """A trunk, two heads and a decoder, for 12×12 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            *(nn.Conv2d(1, 16, 4, 2, 1), nn.SiLU(), nn.Conv2d(16, 32, 4, 2, 1), nn.SiLU(), nn.Flatten()),
            *(nn.Linear(FLAT, FEATURES), nn.SiLU()),
        )
        self.left, self.right = nn.Linear(FEATURES, 10), nn.Linear(FEATURES, 10)
        self.decoder = nn.Sequential(
            *(nn.Linear(FEATURES, FLAT), nn.SiLU(), nn.Unflatten(1, (32, 3, 3))),
            *(nn.ConvTranspose2d(32, 16, 4, 2, 1), nn.SiLU(), nn.ConvTranspose2d(16, 1, 4, 2, 1), nn.Sigmoid()),
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of both heads, and the reconstruction."""
        features = self.trunk(images)
        return self.left(features), self.right(features), self.decoder(features)


def pair(left: Tensor, right: Tensor) -> Tensor:
    """Two images on one canvas, the brighter pixel on top."""
    canvas = torch.zeros(len(left), 2, 8 + SHIFT, 8 + SHIFT)
    canvas[:, 0, :8, :8], canvas[:, 1, SHIFT:, SHIFT:] = left[:, 0], right[:, 0]
    return canvas.amax(1, keepdim=True) / 255


def train(seed: int) -> tuple[float, float]:
    """Mean accuracy and cross-entropy of both heads on the test pairs."""
    torch.manual_seed(seed)
    data = load()
    images, labels = data.train.images.float(), data.train.labels
    network, per_epoch = Network(), len(labels) // BATCH
    optimizer = torch.optim.Adam(network.parameters(), lr=LR)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK * LR, EPOCHS * per_epoch, div_factor=PEAK)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(labels)).split(BATCH):
            others = torch.randint(len(labels), (BATCH,))
            pixels = pair(images[rows], images[others])
            left, right, again = network(pixels)
            error = (again - pixels).square().sum() / BATCH
            loss = F.cross_entropy(left, labels[rows]) + F.cross_entropy(right, labels[others]) + RECONSTRUCTION * error
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return test(network, data.test.images.float(), data.test.labels)


@torch.no_grad()
def test(network: Network, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """The figures on the task's own test pairs."""
    others = torch.randperm(len(labels), generator=own_generator(0, "pairs test"))
    left, right, _ = network(pair(images, images[others]))
    logits, wanted = torch.cat([left, right]), torch.cat([labels, labels[others]])
    return float((logits.argmax(1) == wanted).float().mean()), float(F.cross_entropy(logits, wanted))


def main() -> None:
    """A line a seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    torch.set_num_threads(1)
    for seed in parser.parse_args().seeds:
        accuracy, loss = train(seed)
        print(f"seed {seed}: accuracy {accuracy:.4f}, cross-entropy {loss:.4f} nats")


if __name__ == "__main__":
    main()
