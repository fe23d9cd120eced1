"""Modes of a known mixture that samples cover."""

from __future__ import annotations

import torch
from torch import Tensor

NEAR = 3.0
"""Standard deviations within which a sample counts as one of its mode."""


def mode_coverage(samples: Tensor, centres: Tensor, std: float) -> dict[str, float]:
    """How many modes hold a sample, and how many samples lie in a mode (Srivastava et al. 2017, "VEEGAN").

    A sample is of high quality if its nearest centre is at most 3 standard deviations away. ``modes`` counts the
    centres that are nearest to at least one such sample, ``high_quality`` is the share of such samples.

    Args:
        samples: ``[N, D]``, N at least 1; one that is not finite is of no mode.
        centres: ``[M, D]``.
        std: σ of every mode along each axis, in the samples' units.

    Raises:
        ValueError: there is no sample.

    Example:
        >>> centres = torch.tensor([[0.0, 0.0], [2.0, 0.0]])
        >>> mode_coverage(torch.tensor([[0.1, 0.0], [0.0, 0.2], [1.0, 0.0], [0.0, 5.0]]), centres, 0.1)
        {'modes': 1.0, 'high_quality': 0.5}
    """
    if not len(samples):
        raise ValueError("mode coverage needs at least 1 sample; there are 0")
    distance, nearest = torch.cdist(samples.double(), centres.double()).nan_to_num(torch.inf).min(1)
    good = distance <= NEAR * std
    return {"modes": float(len(nearest[good].unique())), "high_quality": float(good.double().mean())}
