"""A plain classifier with four auxiliaries, against which `adaptive-loss train classify --quick` is checked.

    python benchmarks/reference/classify.py 1 2
    adaptive-loss train classify --quick --dataset digits --seed 1 --output-dir DIR, and --seed 2

Data, shifts, network and draws are the task's, the loop and the losses are not: both follow one course, to rounding.
Test accuracy and cross-entropy (nats) of seeds 1 and 2: 0.9416, 0.6487 and 0.9416, 0.6868 here, and the same four
decimals by the task (fp32, commit ac4ab20).
"""

from __future__ import annotations

import copy
import math
import sys

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from adaptive_loss.data.augment import augmenter, normalise
from adaptive_loss.data.base import Dataset
from adaptive_loss.data.digits import load
from adaptive_loss.models.simple_cnn import SimpleCNN
from adaptive_loss.seeding import own_generator

EPOCHS, BATCH, LR, PEAK = 5, 128, 1e-3, 3.0
TEACHER_DECAY, TEMPERATURE = 0.98, 0.1


def mixup(model: nn.Module, images: Tensor, labels: Tensor, draw: Generator) -> Tensor:
    """Mixed-sample cross-entropy on a quarter of the batch, whose statistics evaluation shall not use."""
    part, share = len(images) // 4, float(torch.rand((), generator=draw))
    partners = torch.randperm(len(images), generator=draw)[:part]
    layers = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    for layer in layers:
        layer.track_running_stats = False
    logits = model(share * images[:part] + (1 - share) * images[partners])
    for layer in layers:
        layer.track_running_stats = True
    return share * F.cross_entropy(logits, labels[:part]) + (1 - share) * F.cross_entropy(logits, labels[partners])


def contrastive(features: Tensor, labels: Tensor) -> Tensor:
    """The supervised contrastive loss, an image at a time; one without a positive counts 0."""
    likeness = F.normalize(features, dim=1) @ F.normalize(features, dim=1).T / TEMPERATURE
    losses = []
    for i in range(len(labels)):
        others = torch.arange(len(labels)) != i
        positives = (labels == labels[i]) & others
        if positives.any():
            losses.append(likeness[i, others].logsumexp(0) - likeness[i, positives].mean())
    return torch.stack(losses).sum() / len(labels)


def total(model: SimpleCNN, teacher: nn.Module, images: Tensor, labels: Tensor, draw: Generator) -> Tensor:
    """All five terms with weight 1."""
    features = model.features(images)
    logits = model.classify(features)
    with torch.no_grad():
        taught = teacher(images).softmax(1)
    log_p = logits.log_softmax(1)
    distilled = (taught * (taught.log() - log_p)).sum(1).mean()
    confident = math.log(logits.shape[1]) + (log_p.exp() * log_p).sum(1).mean()
    own = F.cross_entropy(logits, labels) + contrastive(features, labels)
    return own + mixup(model, images, labels, draw) + distilled + confident


@torch.no_grad()
def follow(teacher: nn.Module, model: nn.Module, updates: int) -> None:
    """The teacher's running mean of the model's weights and batch statistics."""
    decay = min(TEACHER_DECAY, (updates + 1) / (updates + 10))
    for mine, theirs in zip(teacher.state_dict().values(), model.state_dict().values(), strict=True):
        mine.copy_(decay * mine + (1 - decay) * theirs if mine.is_floating_point() else theirs)


def train(data: Dataset, seed: int, epochs: int = EPOCHS, lr: float = LR) -> tuple[float, float]:
    """Accuracy and cross-entropy (nats) on the test images."""
    torch.manual_seed(seed)
    model = SimpleCNN(data.image_shape[1], data.image_shape[0], len(data.classes))
    teacher = copy.deepcopy(model).eval().requires_grad_(False)
    order, shift, draw = (own_generator(seed, purpose) for purpose in ("order", "augment", "mixup"))
    moved, steps = augmenter("standard", data.name), len(data.train) // BATCH
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK * lr, total_steps=epochs * steps, div_factor=PEAK)
    for epoch in range(epochs):
        for step, rows in enumerate(torch.randperm(len(data.train), generator=order).split(BATCH)[:steps]):
            images = normalise(moved(data.train.images[rows], shift), data.mean, data.std)
            optimizer.zero_grad()
            total(model, teacher, images, data.train.labels[rows], draw).backward()
            optimizer.step()
            schedule.step()
            follow(teacher, model, epoch * steps + step)
    with torch.no_grad():
        logits = model.eval()(normalise(data.test.images, data.mean, data.std))
    right = (logits.argmax(1) == data.test.labels).float().mean()
    return float(right), float(F.cross_entropy(logits, data.test.labels))


if __name__ == "__main__":
    torch.set_num_threads(1)
    for given in sys.argv[1:] or ["1", "2"]:
        accuracy, loss = train(load(), int(given))
        print(f"seed {given}: accuracy {accuracy:.4f}, cross-entropy {loss:.4f} nats", flush=True)
