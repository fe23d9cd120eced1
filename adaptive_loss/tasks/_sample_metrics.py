"""What every generative task reports of its samples."""

from __future__ import annotations

from torch import Tensor

from adaptive_loss.metrics import frechet, kid


def sample_metrics(samples: Tensor, reference: Tensor) -> dict[str, float]:
    """``own_kid`` and ``own_frechet`` of features ``[N, D]``: in features of our own, so named, to mislead nobody.

    A split too small for a metric goes without it, so that a short run still ends.
    """
    least = min(len(samples), len(reference))
    found: dict[str, float] = {}
    if least >= kid.LEAST:
        found["own_kid"] = float(kid.kernel_distance(samples.double(), reference.double()))
    if least >= frechet.least_samples(samples.shape[1]):
        found["own_frechet"] = frechet.frechet_distance(samples, reference)
    return found
