"""How far a classifier's confidence is from how often it is right."""

from __future__ import annotations

import torch
from torch import Tensor

BINS = 15


def calibration_error(probabilities: Tensor, labels: Tensor, bins: int = BINS) -> float:
    """The expected calibration error Σ_b n_b/n · |accuracy_b − confidence_b| (Naeini et al. 2015; Guo et al. 2017).

    Examples are put into ``bins`` bins of equal width by their greatest probability.

    Args:
        probabilities: [N, C], rows that sum to 1.
        labels: [N] classes.

    Returns:
        A number in [0, 1]; 0 is calibrated.

    Raises:
        ValueError: there is no example.

    Example:
        >>> sure = torch.tensor([[0.9, 0.1], [0.9, 0.1]])
        >>> round(calibration_error(sure, torch.tensor([0, 1])), 3)  # right half of the time, sure to 0.9
        0.4
    """
    if not len(labels):
        raise ValueError("calibration needs at least one example")
    confidence, guess = probabilities.double().max(1)
    # A bin holds its upper end, so that a confidence of exactly 1 is in the last one.
    place = (confidence * bins).ceil().long().clamp(1, bins) - 1
    excess = confidence - (guess == labels).double()
    sums = torch.zeros(bins, dtype=torch.float64, device=excess.device).index_add(0, place, excess)
    return float(sums.abs().sum() / len(labels))
