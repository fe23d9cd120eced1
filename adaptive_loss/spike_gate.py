"""Spike gate: tells a loss that jumps far above its recent values, and never learns from one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_REFRESH = 8
"""Accepted steps between two renewals of the limits; with very many terms it is up to a window's length, for cost."""

_GROWTH = 2.0
"""A value at most so many times its size above the last accepted one has grown, not jumped."""


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
        size: W, accepted values a term is judged by; they stand in a ring, [W, K], NaN where none is stored yet.
    """

    def __init__(self, n_terms: int, size: int) -> None:
        self.window = torch.full((size, n_terms), math.nan, dtype=torch.float64)
        self.stored = torch.zeros(n_terms, dtype=torch.int64)
        self.absent = torch.zeros(n_terms, dtype=torch.int64)
        self.limits = torch.full((n_terms,), math.inf, dtype=torch.float64)
        self.accepted = 0
        self._refresh = max(_REFRESH, min(n_terms // 8, size))

    def spiking(self, values: Tensor) -> Tensor:
        """[K] bool, the terms above their limit and above three times their last accepted value.

        A loss that grows step by step is no spike, however far it comes: a KL that leaves a collapse rises
        a hundredfold within a window and is on its way to where it should be.
        """
        over = values > self.limits
        if not over.any():
            return over
        last = self._last()
        return over & ~(values <= last + _GROWTH * last.abs())

    def worst(self, values: Tensor, present: Tensor) -> int | None:
        """Index of a present term that spikes, the one farthest above its limit, else None. Both arguments are [K]."""
        over = self.spiking(values)
        if not (over.any() and (over & present).any()):
            return None
        return int(torch.where(over & present, values / self.limits, -math.inf).argmax())

    def admit(self, values: Tensor, held: Tensor | None = None) -> None:
        """Take in an accepted step's values, [K], NaN where a term is absent.

        Its window then stays as it is, until it has been away for as many steps as a window holds: it starts anew. One
        of those in ``held``, [K] bool, is judged by its old window however long it is away.
        """
        fresh = ~torch.isnan(values)
        row = (self.stored % len(self.window)).unsqueeze(0)
        if fresh.all():
            self.window.scatter_(0, row, values.unsqueeze(0))
            self.absent.zero_()
        else:
            self.window.scatter_(0, row, torch.where(fresh, values, self.window.gather(0, row)))
            self._count_absent(fresh, held)
        self.stored += fresh
        self.accepted += 1
        if self.accepted % self._refresh == 0:
            self.limits = spike_limits(self.window)

    def _count_absent(self, fresh: Tensor, held: Tensor | None) -> None:
        away = self.absent + (1 if held is None else ~held)
        self.absent = torch.where(fresh, 0, away)
        gone = self.absent == len(self.window)
        if gone.any():
            self.window[:, gone] = math.nan
            self.stored[gone] = 0
            self.limits[gone] = math.inf

    def last(self) -> list[float]:
        """The last accepted value of each term, NaN where there is none."""
        return self._last().tolist()

    def _last(self) -> Tensor:
        return self.window.gather(0, ((self.stored - 1) % len(self.window)).unsqueeze(0))[0]

    def state_dict(self) -> dict[str, Any]:
        """Everything, as tensors and numbers."""
        tensors = {name: getattr(self, name).clone() for name in ("window", "stored", "absent", "limits")}
        return {**tensors, "accepted": self.accepted}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        for name in ("window", "stored", "absent", "limits"):
            setattr(self, name, state[name].clone())
        self.accepted = state["accepted"]
