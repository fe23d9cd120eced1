"""Bits per dimension: a likelihood that does not depend on the size of the image."""

from __future__ import annotations

import math


def bits_per_dim(nats: float, dimensions: int) -> float:
    """Nats an example → bits a dimension, nats / (D·log 2).

    Args:
        nats: −log p(x) of one example, or a bound of it such as −ELBO.
        dimensions: D, values in an example: channels × height × width.

    Raises:
        ValueError: D is below 1.

    Example:
        >>> bits_per_dim(64 * math.log(2), 64)
        1.0
    """
    if dimensions < 1:
        raise ValueError(f"an example has {dimensions} dimensions; give at least 1")
    return nats / dimensions / math.log(2)
