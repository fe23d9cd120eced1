"""Spike gate: tells a loss that jumps far above its recent values, and never learns from one."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_REFRESH = 8


def spike_limits(window: Tensor) -> Tensor:
    """The value above which each term spikes; ∞ where it cannot be told.

    With m the median of |x| over the term's window, y = asinh(x/m) is linear for small and logarithmic for large
    values, so that one threshold serves stable and heavy-tailed, positive and negative losses:
    limit = m·sinh(median y + max(16 · 1.4826 · MAD(y), 2)). A term that is 0 in half its window has no scale, and one
    whose window is less than a quarter full no history: neither has a limit.

    Args:
        window: [W, K] accepted values, NaN where none is stored yet.

    Example:
        >>> spike_limits(torch.ones(16, 1))  # sinh(asinh(1) + 2)
        tensor([8.8914])
    """
    filled = (~torch.isnan(window)).sum(0)
    scale = window.abs().nanmedian(0).values
    squeezed = torch.asinh(window / scale)
    centre = squeezed.nanmedian(0).values
    spread = (squeezed - centre).abs().nanmedian(0).values * 1.4826
    limits = scale * torch.sinh(centre + (16 * spread).clamp_min(2.0))
    return torch.where((filled * 4 >= len(window)) & (scale > 0), limits, math.inf)


class SpikeGate:
    """Each term's last accepted values and the limit they set, renewed every 8 accepted steps.

    Args:
        n_terms: K.
        size: W, accepted values a term is judged by.
    """

    def __init__(self, n_terms: int, size: int) -> None:
        self.past: list[deque[float]] = [deque(maxlen=size) for _ in range(n_terms)]
        self.size = size
        self.absent = [0] * n_terms
        self.limits = torch.full((n_terms,), math.inf, dtype=torch.float64)
        self.accepted = 0

    @property
    def window(self) -> Tensor:
        """[W, K] the accepted values, oldest first, NaN where none is stored yet."""
        rows = [[*past, *[math.nan] * (self.size - len(past))] for past in self.past]
        return torch.tensor(rows, dtype=torch.float64).T

    def worst(self, values: Tensor, present: Tensor) -> int | None:
        """Index of a present term above its limit, the farthest one, else None. Both arguments are [K]."""
        over = present & (values > self.limits)
        if not over.any():
            return None
        return int(torch.where(over, values / self.limits, -math.inf).argmax())

    def admit(self, values: Tensor) -> None:
        """Take in an accepted step's values, [K], NaN where a term is absent.

        Its window then stays as it is, until it has been away for as many steps as a window holds: it starts anew.
        """
        for i, (past, value) in enumerate(zip(self.past, values.tolist(), strict=True)):
            self.absent[i] = self.absent[i] + 1 if math.isnan(value) else 0
            if not math.isnan(value):
                past.append(value)
            elif self.absent[i] == self.size:
                past.clear()
                self.limits[i] = math.inf
        self.accepted += 1
        if self.accepted % _REFRESH == 0:
            self.limits = spike_limits(self.window)

    def last(self) -> list[float]:
        """The last accepted value of each term, NaN where there is none."""
        return [past[-1] if past else math.nan for past in self.past]

    def state_dict(self) -> dict[str, Any]:
        """Everything, as tensors and numbers."""
        return {
            "window": self.window,
            "limits": self.limits.clone(),
            "accepted": self.accepted,
            "absent": [*self.absent],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        for past, column in zip(self.past, state["window"].T.tolist(), strict=True):
            past.clear()
            past.extend(value for value in column if not math.isnan(value))
        self.limits, self.accepted, self.absent = state["limits"].clone(), state["accepted"], [*state["absent"]]
