"""A student of the digits in plain PyTorch, for the task `distill` to be held against.

    python benchmarks/reference/distill.py --seeds 1 2

The data, the networks, the temperature and the schedules of `adaptive-loss train distill --quick --mode customary`; no
executor, and initial weights, order and shifts of its own.
"""

from __future__ import annotations

import argparse
import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptive_loss.data.digits import load

EPOCHS, BATCH, LR, PEAK = 40, 50, 3e-3, 3.0
TEACHER_STEPS, WARM_UP, FITTING_RATE = 400, 60, 5e-3
TEMPERATURE, DISTILLATION, REFERENCE = 4.0, 9.0, 0.2


def network(narrow: int, wide: int, hidden: int) -> nn.Module:
    """Two strided convolutions and a hidden layer, for 8×8 pixels."""
    return nn.Sequential(
        *(nn.Conv2d(1, narrow, 4, 2, 1), nn.SiLU(), nn.Conv2d(narrow, wide, 4, 2, 1), nn.SiLU(), nn.Flatten()),
        *(nn.Linear(4 * wide, hidden), nn.SiLU(), nn.Linear(hidden, 10)),
    )


def shifted(images: Tensor) -> Tensor:
    """Every image moved by at most a pixel each way, over empty paper."""
    padded = F.pad(images, (1, 1, 1, 1), value=float(images.min()))
    corners = torch.randint(3, (len(images), 2)).tolist()
    return torch.stack([image[:, y : y + 8, x : x + 8] for image, (y, x) in zip(padded, corners, strict=True)])


def fit(model: nn.Module, images: Tensor, labels: Tensor, steps: int) -> nn.Module:
    """Plain cross-entropy for some steps."""
    optimizer = torch.optim.Adam(model.parameters(), lr=FITTING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        rows = torch.randint(len(labels), (BATCH,))
        optimizer.zero_grad()
        F.cross_entropy(model(shifted(images[rows])), labels[rows]).backward()
        optimizer.step()
        schedule.step()
    return model


def terms(student: Tensor, teacher: Tensor, reference: Tensor, labels: Tensor) -> Tensor:
    """The whole loss of one batch, from logits."""
    hard, soft = (teacher / TEMPERATURE).softmax(1), (student / TEMPERATURE).log_softmax(1)
    taught = TEMPERATURE**2 * (hard * (hard.log() - soft)).sum(1).mean()
    own = student.softmax(1)
    away = (own * (student.log_softmax(1) - reference.log_softmax(1))).sum(1).mean()
    return F.cross_entropy(student, labels) + DISTILLATION * taught + REFERENCE * away


def train(seed: int) -> tuple[float, float]:
    """Test accuracy and cross-entropy of the student."""
    torch.manual_seed(seed)
    data = load()
    mean, std = data.mean[:, None, None], data.std[:, None, None]
    images, labels = (data.train.images.float() / 255 - mean) / std, data.train.labels
    teacher = fit(network(32, 64, 128), images, labels, TEACHER_STEPS).requires_grad_(False)
    student = fit(network(8, 16, 32), images, labels, WARM_UP)
    reference = copy.deepcopy(student).requires_grad_(False)
    per_epoch = len(labels) // BATCH
    optimizer = torch.optim.Adam(student.parameters(), lr=LR)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK * LR, EPOCHS * per_epoch, div_factor=PEAK)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(labels)).split(BATCH):
            batch = shifted(images[rows])
            optimizer.zero_grad()
            terms(student(batch), teacher(batch), reference(batch), labels[rows]).backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        logits = student((data.test.images.float() / 255 - mean) / std)
    right = (logits.argmax(1) == data.test.labels).float().mean()
    return float(right), float(F.cross_entropy(logits, data.test.labels))


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
