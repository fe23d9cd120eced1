"""Guards: pure functions that keep a step safe, and the settings they obey.

Losses are checked before any rule sees them, then weights, then gradients; a step that fails a check is rejected
whole, with its reason, and nothing is silently set to zero.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_ROUNDING = 1 - 1e-12  # a ratio so near the limit may have been rounded to its right side: it is clamped, not trusted
REACH = math.log(1e4)
"""Bound of the log-weight's distance from its start, in nats: a start weight may be wrong by 10^±4."""


@dataclass(frozen=True)
class Guards:
    """What the executor checks and bounds.

    Args:
        max_rejections: after this many rejected steps in a row the executor raises.
        spikes: reject a step on which a term jumps far above its recent values. Turn it off where rare batches are
            meant to have a far greater loss than the others.
        spike_window: accepted values a term's spike gate looks back on; silent until a quarter is filled.
        bounds: least and greatest weight of a term that is on, widened to its start weight.
        rate_limit: greatest change of a log-weight from one step to the next, in nats; None for no limit.
        share_cap: greatest share one auxiliary may hold of Σⱼ wⱼ|Lⱼ|; binds only above the start weight. None: no cap.
        clip_norm: greatest gradient norm; longer gradients are scaled down. None: no clipping.
        quarantine: rejected steps after which the auxiliary that they name is left out, and the run goes on on the
            other terms. None: it stays, and after ``max_rejections`` in a row the executor raises.
        quarantine_steps: healthy steps in a row after which such a term is back on probation, where one bad step
            takes it out again; after as many more its past is forgotten.
    """

    max_rejections: int = 10
    spikes: bool = True
    spike_window: int = 64
    bounds: tuple[float, float] = (1e-12, 1e12)
    rate_limit: float | None = 1.0
    share_cap: float | None = 0.9
    clip_norm: float | None = None
    quarantine: int | None = None
    quarantine_steps: int = 100

    def __post_init__(self) -> None:
        low, high = self.bounds
        if not 0 < low < high:
            raise ValueError(f"Guards.bounds is {self.bounds}: give 0 < least < greatest weight")
        if self.share_cap is not None and not 0 < self.share_cap <= 1:
            raise ValueError(f"Guards.share_cap is {self.share_cap}: give a share in (0, 1], or None")
        if self.rate_limit is not None and not self.rate_limit > 0:
            raise ValueError(f"Guards.rate_limit is {self.rate_limit}: give a positive number of nats, or None")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"Guards.clip_norm is {self.clip_norm}: give a positive norm, or None")
        if self.max_rejections < 1 or self.spike_window < 16:
            raise ValueError("Guards.max_rejections must be at least 1 and Guards.spike_window at least 16")
        self._check_quarantine()

    def _check_quarantine(self) -> None:
        if self.quarantine is not None and not 1 <= self.quarantine < self.max_rejections:
            raise ValueError(
                f"Guards.quarantine is {self.quarantine}: give a number of rejected steps of at least 1 and below "
                f"max_rejections ({self.max_rejections}), or None"
            )
        if self.quarantine_steps < 1:
            raise ValueError(f"Guards.quarantine_steps is {self.quarantine_steps}: give a number of steps, at least 1")


def first_non_finite(values: Tensor, present: Tensor) -> int | None:
    """Index of the first present term whose value is NaN or infinite, else None. Both arguments are [K]."""
    # Whatever is not finite shows in the sum; an absent term, or one too large a sum, only costs the longer look.
    return None if math.isfinite(values.sum()) else _first(present & ~torch.isfinite(values))


def first_bad_weight(weights: Tensor, present: Tensor) -> int | None:
    """Index of the first present term whose weight is negative, NaN or infinite, else None. Both arguments are [K]."""
    least, greatest = _extremes(weights)
    if least >= 0 and greatest < math.inf:
        return None
    return _first(present & ~((weights >= 0) & torch.isfinite(weights)))


def _first(bad: Tensor) -> int | None:
    return int(bad.int().argmax()) if bad.any() else None


def _extremes(values: Tensor) -> tuple[float, float]:
    """The least and the greatest entry, NaN where any is; cheap enough to ask before every closer look."""
    least, greatest = torch.aminmax(values)
    return least.item(), greatest.item()


def limit_rate(weights: Tensor, last: Tensor, rate: float) -> Tensor:
    """Hold each log-weight within ``rate`` nats of the last one; a weight that is or was 0 is left alone. All [K]."""
    factor = math.exp(min(rate, 700.0))
    least, greatest = _extremes(weights / last)
    if 1 / factor < least * _ROUNDING and greatest < factor * _ROUNDING:
        return weights
    return torch.where((weights > 0) & (last > 0), weights.clamp(last / factor, last * factor), weights)


def cap_shares(weights: Tensor, start: Tensor, values: Tensor, capped: Tensor, cap: float) -> Tensor:
    """Lower the weights of auxiliaries whose share of Σⱼ wⱼ|Lⱼ| is above ``cap``, but never below their start.

    A term lowered to its cap has mass cap·T, where T is the total after capping: with C capped terms and rest mass R,
    T = R / (1 − cap·C). Terms join the capped set until none is above its cap; a term whose start alone is above the
    cap keeps its start weight and counts among the rest. A term that is alone this step has no share to cap.

    Args:
        weights, start, values: [K] applied weights, start weights, this step's losses (NaN where absent).
        capped: [K] bool, the terms the cap applies to.
        cap: greatest share in (0, 1].
    """
    mass = (weights * values).abs()
    if not (capped & (mass > cap * mass.nansum())).any() or int((~torch.isnan(values) & (start > 0)).sum()) < 2:
        return weights
    size = values.abs().nan_to_num(0.0)
    mass, floor = weights * size, start * size
    held = torch.zeros_like(capped)
    for _ in range(len(weights) + 1):
        count = int(held.sum())
        if cap * count >= 1:
            break
        total = mass[~held].sum() / (1 - cap * count)
        over = capped & ~held & (mass > floor) & (mass > cap * total * (1 + 1e-12))
        if not over.any():
            if not count:
                return weights
            lowered = torch.maximum(cap * total / size.clamp_min(1e-300), start)
            return torch.where(held, torch.minimum(lowered, weights), weights)
        at_floor = over & (floor >= cap * total)
        mass = torch.where(at_floor, floor, mass)
        weights = torch.where(at_floor, start, weights)
        held = held | (over & ~at_floor)
    return torch.where(held, torch.minimum(weights, start), weights)


def bound_weights(weights: Tensor, start: Tensor, bounds: tuple[float, float]) -> Tensor:
    """Clamp every weight to ``bounds``, widened to its start weight; 0 (a term is off, or waits) stays 0. All [K]."""
    least, greatest = _extremes(weights)
    if bounds[0] <= least and greatest <= bounds[1] and start.all():
        return weights
    low, high = start.clamp(max=bounds[0]), start.clamp(min=bounds[1])
    return torch.where((start > 0) & (weights > 0), weights.clamp(low, high), 0.0)


def guard_weights(
    settings: Guards, weights: Tensor, last: Tensor | None, start: Tensor, values: Tensor, capped: Tensor
) -> list[tuple[str, Tensor]]:
    """Bounds, rate limit and share cap in this order: each guard's name and the [K] weights it lets through.

    Args:
        settings: what to apply.
        weights: [K] what rule and modulators ask for.
        last: [K] the weights of the last accepted step; None before the first.
        start, values, capped: [K] as for :func:`cap_shares`.
    """
    stages = [("bounds", bound_weights(weights, start, settings.bounds))]
    if settings.rate_limit is not None and last is not None:
        stages.append(("rate limit", limit_rate(stages[-1][1], last, settings.rate_limit)))
    if settings.share_cap is not None:
        stages.append(("share cap", cap_shares(stages[-1][1], start, values, capped, settings.share_cap)))
    return stages


def largest_norm(gradients: Sequence[Tensor], norm: float) -> float:
    """``norm`` itself, or, where it overflowed though every gradient is finite, the largest finite number."""
    if math.isfinite(norm) or not all(bool(torch.isfinite(g).all()) for g in gradients):
        return norm
    return min(math.hypot(*(float(g.double().norm()) for g in gradients)), sys.float_info.max)
