"""Random generators with one purpose each, and the global ones of those who draw from them all the same."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import torch


def seed_global(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.manual_seed(seed)


def own_generator(seed: int, purpose: str) -> torch.Generator:
    """A generator for one purpose alone, so that drawing more for one never shifts what another draws.

    Args:
        seed: the run's seed.
        purpose: what it is for ("split", "order"); another purpose gives an unrelated stream.

    Example:
        >>> own_generator(1, "order").initial_seed() == own_generator(1, "augment").initial_seed()
        False
    """
    digest = hashlib.sha256(f"{purpose}:{seed}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
