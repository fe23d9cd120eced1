"""Data that are no images: points with what is known at them, in four fixed splits."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Points:
    """Points and the values at them.

    Attributes:
        inputs: float32 ``[N, D]``.
        targets: float32 ``[N, T]``; T is 0 where nothing is known but the points themselves.

    Raises:
        TypeError: they are not float32.
        ValueError: the shapes do not fit together.

    Example:
        >>> import torch
        >>> len(Points(torch.rand(8, 2), torch.empty(8, 0)))
        8
    """

    inputs: Tensor
    targets: Tensor

    def __post_init__(self) -> None:
        if self.inputs.dtype != torch.float32 or self.targets.dtype != torch.float32:
            raise TypeError(f"points are float32, not {self.inputs.dtype} with targets {self.targets.dtype}")
        if self.inputs.ndim != 2 or self.targets.ndim != 2 or len(self.inputs) != len(self.targets):
            raise ValueError(
                "points are inputs [N, D] and targets [N, T], "
                f"not {list(self.inputs.shape)} and {list(self.targets.shape)}"
            )

    def __len__(self) -> int:
        return len(self.inputs)


@dataclass(frozen=True, eq=False)
class PointDataset:
    """Points in their four splits.

    Attributes:
        name: the short name, as reports print it ("burgers").
        train, probe, select, test: disjoint splits.
        provenance: where the data came from: ``source``, ``licence`` and ``sha256`` of the points, at least.
    """

    name: str
    train: Points
    probe: Points
    select: Points
    test: Points
    provenance: dict[str, object]

    @cached_property
    def held_in(self) -> Points:
        """Train, probe and select as one split, for an arm that holds nothing out but the test set."""
        parts = (self.train, self.probe, self.select)
        return Points(torch.cat([part.inputs for part in parts]), torch.cat([part.targets for part in parts]))
