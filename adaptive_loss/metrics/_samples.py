"""What every metric of samples asks of its features."""

from __future__ import annotations

from torch import Tensor


def check_samples(metric: str, least: int, **features: Tensor) -> None:
    """Raise ``ValueError`` unless all are ``[N, D]`` with one D, and N is at least ``least``.

    Args:
        metric: its name, for the message.
        least: samples needed in each.
        features: by name, for the message.
    """
    shapes = {name: list(part.shape) for name, part in features.items()}
    if any(len(shape) != 2 for shape in shapes.values()) or len({shape[1] for shape in shapes.values()}) != 1:
        raise ValueError(f"{metric} compares features [N, D] with one D, not {shapes}")
    for name, shape in shapes.items():
        if shape[0] < least:
            raise ValueError(f"{metric} needs at least {least} samples of {shape[1]} features; {name} has {shape[0]}")
