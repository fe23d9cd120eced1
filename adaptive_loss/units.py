"""One unit for all terms: nats per example, so that a weight means the same at every image and batch size."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Kind = Literal["nats", "bits", "mean", "sum", "batch_sum", "bits_per_dimension"]
KINDS: tuple[Kind, ...] = ("nats", "bits", "mean", "sum", "batch_sum", "bits_per_dimension")


@dataclass(frozen=True)
class Reduction:
    """How a term's loss was reduced, and hence the factor that makes nats per example of it.

    With D values an example and B examples a batch, and every loss a sum or mean of nats over values and examples:

    ====================  ===============================  ========
    kind                  the term is                      factor
    ====================  ===============================  ========
    ``nats``              summed over D, mean over B       1
    ``bits``              the same, in bits                ln 2
    ``mean``              mean over D and B                D
    ``bits_per_dimension``  the same, in bits              D·ln 2
    ``batch_sum``         mean over D, sum over B          D/B
    ``sum``               summed over D and B              1/B
    ====================  ===============================  ========

    PyTorch's ``reduction="mean"`` is ``mean``, its ``"sum"`` is ``sum``; ``"batchmean"`` of a KL over D is ``nats``.

    Args:
        kind: one of the above.
        dimensions: D, values an example (3·32·32 for a CIFAR image, the latent's size for its KL).
        examples: B, examples a batch.

    Raises:
        ValueError: another kind, or a size below 1.

    Example:
        >>> Reduction("mean", dimensions=3072).factor, Reduction("sum", examples=128).factor
        (3072.0, 0.0078125)
    """

    kind: Kind
    dimensions: int = 1
    examples: int = 1

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown reduction {self.kind!r}; choose from: {', '.join(KINDS)}")
        if self.dimensions < 1 or self.examples < 1:
            raise ValueError(f"dimensions {self.dimensions} and examples {self.examples} must be at least 1")

    @property
    def factor(self) -> float:
        """What the loss is multiplied by to become nats per example."""
        return {
            "nats": 1.0,
            "bits": math.log(2),
            "mean": float(self.dimensions),
            "bits_per_dimension": self.dimensions * math.log(2),
            "batch_sum": self.dimensions / self.examples,
            "sum": 1 / self.examples,
        }[self.kind]
