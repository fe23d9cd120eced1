"""Signals: what monitor, controller and rules see of a run, in unit-free, clipped form, computed once a step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adaptive_loss.gradients import Gramians, LookAhead

Array = NDArray[np.float64]

VERSION = 1
"""Changes whenever a feature changes its meaning, so that a policy trained on other signals is refused."""

TERM_FEATURES = (
    "log_fast_over_slow",
    "log_over_first",
    "log_spread",
    "log_gradient_share",
    "cos_base",
    "cos_probe",
    "trust",
    "log_weight_over_set_point",
    "log_weight_over_start",
)
GLOBAL_FEATURES = (
    "past_3_percent",
    "past_10_percent",
    "past_25_percent",
    "past_50_percent",
    "past_80_percent",
    "past_110_percent",
    "probe_slope",
    "log_probe_over_train",
    "log_gradient_norm",
    "clip_rate",
    "log_learning_rate",
)
_PROGRESS_CENTRES = (0.03, 0.1, 0.25, 0.5, 0.8, 1.1)
_CLIP = 5.0
_TINY = 1e-30
_FAST, _SLOW, _GAIN = 0.9, 0.99, 0.8
_FIRST_STEPS = 10
_APART, _GROWTH = 50, 1.25
"""A term that comes sooner is one of the first; and of many that come one by one, as rare buckets do, few count."""
_REMEMBERED = 12
"""Look-aheads that are remembered; the oldest counts for less than a tenth of the newest."""
_ROUNDING = 1e-6
"""A cosine as small as this is rounding of float32 products, and its sign no evidence."""
_LARGEST_MEMORY = 4_000_000
"""Numbers that the remembered Gramians hold at most, which a thousand terms would exceed."""


class Average:
    """Exponential moving averages of the entries of a vector, corrected for their start; NaN entries are left out.

    mean = m / (1 − βⁿ) with m ← βm + (1−β)x, n counted an entry.

    Args:
        decays: β of each entry, float64.
    """

    def __init__(self, decays: Tensor) -> None:
        self.rate = 1 - decays
        self.sum, self.weight = torch.zeros_like(decays), torch.zeros_like(decays)
        self.one = torch.ones_like(decays)

    def update(self, values: Tensor) -> None:
        """Take in one vector of values."""
        fresh = self.rate * ~torch.isnan(values)
        self.sum.lerp_(values.nan_to_num(0.0), fresh)
        self.weight.lerp_(self.one, fresh)

    @property
    def mean(self) -> Tensor:
        """The averages, NaN where no value has come yet."""
        with np.errstate(invalid="ignore"):
            return torch.from_numpy(self.sum.numpy() / self.weight.numpy())


class Signals:
    """Running statistics of K terms, the whole training step and the look-aheads.

    Log ratios need positive losses; once a term has been seen at or below 0, its differences are scaled by its
    running spread instead.

    Args:
        n_terms: K.
        total_steps: length of the run in optimizer steps; None where unknown (progress then stays 0).

    Attributes:
        arrivals: [K] step (from 0) at which the term was there first, 0 where it has not come yet.
        newest: the last arrival in mid-run, 0 without one.

    Example:
        >>> signals = Signals(2, total_steps=100)
        >>> signals.update(torch.tensor([1.0, 2.0], dtype=torch.float64))
        >>> signals.term_features(torch.ones(2), torch.ones(2), torch.ones(2)).shape
        torch.Size([2, 9])
    """

    def __init__(self, n_terms: int, total_steps: int | None) -> None:
        self.total_steps = total_steps
        self.step = 0
        self.n_terms = n_terms
        # All in one vector, for a step's cost: K losses, K losses over longer, K squares, gradient norm, clips.
        self.averages = Average(torch.tensor([_FAST] * n_terms + [_SLOW] * (2 * n_terms + 2), dtype=torch.float64))
        self.first = torch.full((n_terms,), math.nan, dtype=torch.float64)
        self.counts = torch.zeros(n_terms, dtype=torch.float64)
        self.arrivals = torch.zeros(n_terms, dtype=torch.float64)
        self.newest = 0
        self.signed = torch.zeros(n_terms, dtype=torch.bool)
        self.gain = torch.zeros(n_terms, dtype=torch.float64)
        self.gain_square = torch.zeros(n_terms, dtype=torch.float64)
        self.cos_base = torch.zeros(n_terms, dtype=torch.float64)
        self.cos_probe = torch.zeros(n_terms, dtype=torch.float64)
        self.share = torch.full((n_terms,), 1.0 / n_terms, dtype=torch.float64)
        self.look_aheads = 0
        self.gramians = torch.zeros(0, n_terms + 1, n_terms + 1, dtype=torch.float64)
        self.probe, self.probe_slope, self.probe_over_train = math.nan, 0.0, 0.0
        self.last_norm = math.nan
        self.first_rate = self.rate = math.nan

    def update(
        self, values: Tensor, *, gradient_norm: float = math.nan, clipped: bool = False, learning_rate: float = math.nan
    ) -> None:
        """Advance by one accepted optimizer step; ``values`` are the terms' losses, [K], NaN where absent."""
        self.step += 1
        self.signed |= values <= 0
        gradient = torch.tensor([gradient_norm, clipped], dtype=torch.float64)
        self.averages.update(torch.cat((values, values, values * values, gradient)))
        early = self.counts < _FIRST_STEPS
        if early.any():
            self._update_first(values, early & ~torch.isnan(values))
        self.last_norm = gradient_norm
        self.rate = learning_rate
        if math.isnan(self.first_rate):
            self.first_rate = learning_rate

    def _update_first(self, values: Tensor, fresh: Tensor) -> None:
        new, before = fresh & (self.counts == 0), self.step - 1
        if before and new.any():
            self.arrivals = torch.where(new, float(before), self.arrivals)
            if before >= _APART + _GROWTH * self.newest:
                self.newest = before
        self.counts += fresh
        mean = torch.where(self.counts > 1, self.first, 0.0)
        self.first = torch.where(fresh, mean + (values - mean) / self.counts, self.first)

    def look(self, found: LookAhead, train: float) -> None:
        """Take in one look-ahead; ``train`` is the base term's (or the weighted total's) value of the same step.

        The trust statistic is tᵢ = EMA(h̃ᵢ)/√EMA(h̃ᵢ²) with decay 0.8, both averages started at 0, so a first
        look-ahead counts for less than a settled one.
        """
        known = ~torch.isnan(found.gain)
        self.gain = torch.where(known, _GAIN * self.gain + (1 - _GAIN) * found.gain, self.gain)
        self.gain_square = torch.where(known, _GAIN * self.gain_square + (1 - _GAIN) * found.gain**2, self.gain_square)
        self.cos_base = torch.where(known, found.cos_base, self.cos_base)
        self.cos_probe = torch.where(known, found.cos_probe, self.cos_probe)
        self.share = torch.where(known, found.share, self.share)
        self.look_aheads += 1
        kept = min(_REMEMBERED, max(1, _LARGEST_MEMORY // found.products.numel()))
        self.gramians = torch.cat([self.gramians, found.products[None]])[-kept:]
        self.see_objective(found.objective)
        self.probe_over_train = log_ratio(found.objective, train)

    def see_objective(self, objective: float) -> None:
        """Take in a value of the objective on held-out data."""
        if not math.isnan(self.probe):
            self.probe_slope = 0.8 * self.probe_slope + 0.2 * log_ratio(objective, self.probe)
        self.probe = objective

    @property
    def fast(self) -> Tensor:
        """[K] the losses' average over about 10 steps, NaN where none has come yet."""
        return self.averages.mean[: self.n_terms]

    @property
    def slow(self) -> Tensor:
        """[K] the losses' average over about 100 steps, NaN where none has come yet."""
        return self.averages.mean[self.n_terms : 2 * self.n_terms]

    @property
    def progress(self) -> float | None:
        """Share of the run that is done, or None where its length is unknown."""
        return None if self.total_steps is None else self.step / self.total_steps

    @property
    def trust(self) -> Tensor:
        """[K] tᵢ in [−1, 1]: how steadily the look-aheads say that term i deserves more weight."""
        root = np.sqrt(self.gain_square.numpy())
        return torch.from_numpy((self.gain.numpy() / np.maximum(root, 1e-300)).clip(-1.0, 1.0))

    @property
    def t_statistic(self) -> Tensor:
        """[K] t of the look-aheads' mean: m/√((EMA(h̃²) − m²)/n), n = 9 the effective number behind decay 0.8."""
        effective = (1 + _GAIN) / (1 - _GAIN)
        mean = self.gain.numpy()
        variance = np.maximum(self.gain_square.numpy() - mean * mean, 1e-300)
        return torch.from_numpy(mean / np.sqrt(variance / effective))

    @np.errstate(over="ignore", invalid="ignore")
    def term_features(self, weights: Tensor, set_point: Tensor, start: Tensor) -> Tensor:
        """[K, 9] in the order of ``TERM_FEATURES``, clipped to ±5; 0 where nothing is known yet. Arguments are [K]."""
        fast, slow, square = self.averages.mean.numpy()[: 3 * self.n_terms].reshape(3, -1)
        spread = np.sqrt(np.maximum(square - slow * slow, 0))
        to_slow, to_first = self._ratios(np.array((fast, slow, self.first.numpy())), spread)
        log_weights = _safe_log(np.array((weights.numpy(), set_point.numpy(), start.numpy())))
        columns = (
            to_slow,
            to_first / 5,
            _log(spread) - _log(np.abs(slow)),
            np.log(np.maximum(self.share.numpy(), 1e-12)),
            self.cos_base.numpy(),
            self.cos_probe.numpy(),
            self.trust.numpy(),
            *(log_weights[0] - log_weights[1:]),
        )
        return torch.from_numpy(_bounded(np.array(columns)).T)

    def global_features(self) -> Tensor:
        """[11] in the order of ``GLOBAL_FEATURES``, clipped to ±5; 0 where nothing is known yet."""
        progress = self.progress or 0.0
        mean_norm, clip_rate = self.averages.mean.numpy()[-2:].tolist()
        values = [math.tanh(10 * (progress - centre)) for centre in _PROGRESS_CENTRES]
        values += [
            10 * self.probe_slope,
            self.probe_over_train,
            log_ratio(self.last_norm, mean_norm),
            clip_rate,
            log_ratio(self.rate, self.first_rate),
        ]
        return torch.from_numpy(_bounded(np.array(values)))

    def _ratios(self, levels: Array, spread: Array) -> Array:
        """[n − 1, K] log-ratios of each of n levels, [n, K], to the next; of a signed term differences in spreads."""
        logs = _log(levels)
        ratios = logs[:-1] - logs[1:]
        signed = self.signed.numpy()
        if not signed.any():
            return ratios
        # A constant loss differs from its average by rounding alone, which must not count as many spreads.
        least = np.maximum(np.maximum(spread, 1e-12 * np.abs(levels[1:])), _TINY)
        return np.where(signed, (levels[:-1] - levels[1:]) / least, ratios)

    def state_dict(self) -> dict[str, Any]:
        """Everything, as tensors and numbers."""
        return {name: _pack(value) for name, value in vars(self).items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        for name, value in vars(self).items():
            loaded = state[name]
            if isinstance(value, Average):
                value.sum, value.weight = (part.clone() for part in loaded)
            else:
                setattr(self, name, loaded.clone() if isinstance(loaded, Tensor) else loaded)


class Recall:
    """What ``trust`` and ``share`` would be had all remembered look-aheads been at other weights.

    A trust from old weights lags behind: it goes on saying "more" for many look-aheads after a weight has become
    right. Asked at the weights in question, the same evidence says where to stop.

    Args:
        gramians: [..., M, K+1, K+1], the newest last; those of several runs may be asked at once.

    Example:
        >>> A = torch.tensor([[[1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 1.0]]], dtype=torch.float64)
        >>> trust, share = Recall(A).at(np.array([1.0, 1e-9]))  # term 0 alone is what serves
        >>> share.round(6).tolist()
        [1.0, 0.0]
    """

    def __init__(self, gramians: Tensor) -> None:
        self.gramians = Gramians(gramians)
        self.part = (1 - _GAIN) * _GAIN ** np.arange(gramians.shape[-3] - 1, -1, -1)

    def at(self, weights: Array) -> tuple[Array, Array]:
        """Trust and share at ``weights``, each [..., K]; the parts sum to less than 1, so no trust lies beyond ±1."""
        gains, share = self.gramians.at(weights)
        root = np.sqrt((gains * gains) @ self.part)
        return gains @ self.part / np.maximum(root, _ROUNDING), share


def log_ratio(top: float, bottom: float) -> float:
    """log(top/bottom) for positive numbers, their difference scaled by the greater size otherwise; 0 where unknown."""
    if not (math.isfinite(top) and math.isfinite(bottom)):
        return 0.0
    if top > 0 and bottom > 0:
        return math.log(top) - math.log(bottom)
    return (top - bottom) / max(abs(top), abs(bottom), 1e-30)


def _log(sizes: Array) -> Array:
    return np.log(np.maximum(sizes, _TINY))


def _safe_log(weights: Array) -> Array:
    """Their logs, 0 for weights of 0."""
    return np.log(np.where(weights > 0, weights, 1.0))


def _bounded(features: Array) -> Array:
    """The features clipped to ±5, 0 where they are not finite."""
    return np.where(np.isfinite(features), features, 0.0).clip(-_CLIP, _CLIP)


def _pack(value: Any) -> Any:
    if isinstance(value, Average):
        return [value.sum.clone(), value.weight.clone()]
    return value.clone() if isinstance(value, Tensor) else value
