"""The embedded digits, split anew for every run."""

from __future__ import annotations

from functools import cache

import torch
from torch import Generator, Tensor

from adaptive_loss.data.digits import load

HELD_OUT = 150


@cache
def _all_digits() -> tuple[Tensor, Tensor]:
    data = load(seed=0)
    parts = (data.train, data.probe, data.select)
    images = torch.cat([part.images.flatten(1).float() / 255 for part in parts])
    return images, torch.cat([part.labels for part in parts])


def split_digits(n_train: int, dice: Generator) -> dict[str, Tensor]:
    """``x``, ``y`` [n_train] to train on, and 150 each to probe and to judge; the test digits are in none."""
    images, labels = _all_digits()
    order = torch.randperm(len(images), generator=dice)
    parts = {"probe_": order[:HELD_OUT], "judge_": order[HELD_OUT : 2 * HELD_OUT], "": order[2 * HELD_OUT :][:n_train]}
    return {f"{part}{kind}": values[rows] for part, rows in parts.items() for kind, values in _named(images, labels)}


def _named(images: Tensor, labels: Tensor) -> tuple[tuple[str, Tensor], tuple[str, Tensor]]:
    return ("x", images), ("y", labels)
