"""Named losses: which terms there are, what role each plays, and what one step's losses hold."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from numbers import Real

import torch
from torch import Tensor

from adaptive_loss.buckets import Buckets
from adaptive_loss.units import Reduction

LossTerms = Mapping[str, Tensor]
"""Name of a term → its loss this step, a 0-dim tensor; a term that is missing or ``None`` is absent this step."""


@dataclass(frozen=True)
class Terms:
    """The fixed description of K named terms.

    A term's role is *base* (its weight stays put), *constraint* (it has a target, held by a set-point law) or
    *auxiliary* (free to move, capped). Without a base every term is an auxiliary and the weights keep their sum.

    Args:
        start: name → start weight, ≥ 0; the insertion order is the term order. A start weight of 0 stays off.
        base: name of the base term, or None.
        targets: name → target value, for the terms that are constraints.
        reductions: name → how that term's loss was reduced; it is then read in nats per example, target included.
        pinned: auxiliaries whose weights monitor and controller leave alone, as they do the base's: those that hold an
            estimator together and about which a look-ahead says nothing, such as a VQ autoencoder's commitment.

    Raises:
        ValueError: no terms, a weight that is negative or not finite, all weights 0, a base that is off, a
            target for the base or for a term that is off; a pinned term without a base, since weights are then only
            ratios, or one with a target.
        TypeError: weights that are not a mapping of names to numbers.
        KeyError: a base, target or pinned term that is not a term.

    Example:
        >>> terms = Terms({"reconstruction": 1.0, "kl": 0.5}, base="reconstruction")
        >>> terms.names, terms.movable.tolist()
        (('reconstruction', 'kl'), [False, True])
    """

    start: Mapping[str, float]
    base: str | None = None
    targets: Mapping[str, float] = field(default_factory=dict)
    reductions: Mapping[str, Reduction] = field(default_factory=dict)
    pinned: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_weights(self.start)
        object.__setattr__(self, "start", {name: float(weight) for name, weight in self.start.items()})
        if self.base is not None:
            self._check_known("base", self.base)
            if self.start[self.base] == 0:
                raise ValueError(f"the base term {self.base!r} has start weight 0: give it a positive weight")
        for name, reduction in self.reductions.items():
            self._check_known("reduction", name)
            if not isinstance(reduction, Reduction):
                kind = type(reduction).__name__
                raise TypeError(f"the reduction of term {name!r} is a {kind}: give a Reduction('nats')")
        for name, target in self.targets.items():
            self._check_known("target", name)
            if name == self.base or self.start[name] == 0:
                role = "the base, whose weight stays put" if name == self.base else "off (start weight 0)"
                raise ValueError(f"term {name!r} has a target but is {role}: drop the target or change its role")
            if not isinstance(target, Real):
                raise TypeError(f"the target of term {name!r} is a {type(target).__name__}: give a number")
            if not math.isfinite(target):
                raise ValueError(f"the target of term {name!r} is {target}: give a finite number")
        for name in self.pinned:
            self._check_known("pinned term", name)
            if self.base is None:
                raise ValueError(f"term {name!r} is pinned, but without a base weights are only ratios: name a base")
            if name in self.targets:
                raise ValueError(f"term {name!r} is pinned and has a target: drop one of the two")

    def _check_known(self, what: str, name: str) -> None:
        if name not in self.start:
            raise KeyError(f"the {what} {name!r} is not a term; the terms are: {', '.join(self.start)}")

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The terms' names in term order."""
        return tuple(self.start)

    @cached_property
    def places(self) -> dict[str, int]:
        """Each term's place in the order."""
        return {name: place for place, name in enumerate(self.start)}

    @cached_property
    def start_weights(self) -> Tensor:
        """The start weights, [K] float64."""
        return torch.tensor(list(self.start.values()), dtype=torch.float64)

    @cached_property
    def active(self) -> Tensor:
        """[K] bool: the terms that are on at all (start weight > 0)."""
        return self.start_weights > 0

    @cached_property
    def unit(self) -> Tensor:
        """[K] float64: 1 for the terms that are on, NaN for the others, whose values then count as absent."""
        return torch.where(self.active, 1.0, torch.nan).double()

    @cached_property
    def movable(self) -> Tensor:
        """[K] bool: the auxiliaries that are on, whose weights monitor and controller may move."""
        held = [name == self.base or name in self.targets or name in self.pinned for name in self.names]
        return self.active & ~torch.tensor(held)

    @cached_property
    def is_base(self) -> Tensor:
        """[K] bool: the base term."""
        return torch.tensor([name == self.base for name in self.names])

    @cached_property
    def base_index(self) -> int | None:
        """The base term's place in the order, or None without a base."""
        return None if self.base is None else self.places[self.base]

    def read(self, losses: LossTerms | Buckets) -> StepLosses:
        """Check one step's losses and read their values with one transfer to the host.

        Raises:
            TypeError: ``losses`` is not a mapping, or a term is not a tensor.
            KeyError: a term that was not declared.
            ValueError: no term at all, a term that is not a scalar, has no gradient, or lives on another device.
        """
        if isinstance(losses, Buckets):
            if self.reductions:
                raise ValueError(
                    "buckets come in one tensor: bring their losses into one unit before, not by reductions"
                )
            return self._read_buckets(losses)
        if not isinstance(losses, Mapping):
            raise TypeError(f"losses must be a dict of name → 0-dim tensor, not {type(losses).__name__}")
        for name in losses:
            if name not in self.start:
                raise KeyError(f"unknown term {name!r}; the executor's terms are: {', '.join(self.start)}")
        tensors = [losses.get(name) for name in self.names]
        for name, tensor in zip(self.names, tensors, strict=True):
            if tensor is not None:
                self._check_tensor(name, tensor)
        present = [(name, tensor) for name, tensor in zip(self.names, tensors, strict=True) if tensor is not None]
        if not present:
            raise ValueError(f"no term is present this step; give at least one of: {', '.join(self.names)}")
        first_name, first = present[0]
        for name, tensor in present[1:]:
            if tensor.device != first.device:
                raise ValueError(
                    f"term {name!r} is on {tensor.device} and {first_name!r} on {first.device}: move them to one device"
                )
        tensors = [self._in_unit(name, tensor) for name, tensor in zip(self.names, tensors, strict=True)]
        return StepLosses(tuple(tensors), _values(tensors), torch.tensor([tensor is not None for tensor in tensors]))

    def _in_unit(self, name: str, tensor: Tensor | None) -> Tensor | None:
        reduction = self.reductions.get(name)
        return tensor if tensor is None or reduction is None else tensor * reduction.factor

    def _read_buckets(self, buckets: Buckets) -> StepLosses:
        if len(buckets.means) != len(self.names):
            raise ValueError(f"there are {len(buckets.means)} buckets, the executor has {len(self.names)} terms")
        if torch.is_grad_enabled() and not buckets.means.requires_grad:
            raise ValueError("the buckets have no gradient: they were detached, or computed under no_grad")
        there = buckets.present.to(buckets.means.device)
        means, full = torch.stack([buckets.means.detach().double(), there.double()]).cpu().unbind()
        present = full > 0
        known = means.where(present, math.nan)
        if not present.any():
            raise ValueError("every bucket is empty this step; give at least one sample")
        return StepBuckets((), known, present, buckets.means)

    def _check_tensor(self, name: str, tensor: Tensor) -> None:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"term {name!r} is a {type(tensor).__name__}: give a 0-dim tensor with a gradient")
        if tensor.dim() != 0:
            raise ValueError(
                f"term {name!r} has shape {tuple(tensor.shape)}: reduce it to a scalar (.mean() or .sum())"
            )
        if not tensor.is_floating_point():
            raise TypeError(f"term {name!r} has dtype {tensor.dtype}: give a real floating-point tensor")
        if torch.is_grad_enabled() and not tensor.requires_grad and self.start[name] > 0:
            raise ValueError(
                f"term {name!r} has no gradient: it was detached, or computed under no_grad; "
                "pass the live tensor, or leave the term out of this step"
            )


@dataclass(frozen=True)
class StepLosses:
    """One step's losses.

    Args:
        tensors: the live tensors, None where absent.
        values: [K] float64, NaN where absent.
        present: [K] bool, the terms that are there this step.
    """

    tensors: tuple[Tensor | None, ...]
    values: Tensor
    present: Tensor

    def with_all_ranks(self, values: Tensor, present: Tensor) -> StepLosses:
        """The same live tensors with the [K] values, and the presence, that all ranks have together."""
        return replace(self, values=values, present=present)

    @property
    def roots(self) -> list[Tensor]:
        """The live tensors that are there."""
        return [tensor for tensor in self.tensors if tensor is not None]

    def live(self, on: Tensor) -> list[Tensor | None]:
        """The live tensors of the terms that are on, None for the others; on is [K] bool."""
        return [loss if active else None for loss, active in zip(self.tensors, on.tolist(), strict=True)]

    def total(self, weights: Tensor, on: Tensor, penalty: Tensor | None = None) -> Tensor:
        """Σᵢ wᵢLᵢ in term order over the terms that are there and on, and the penalty; weights are [K] on the host."""
        total: Tensor | None = None
        for loss, weight in zip(self.live(on), weights.tolist(), strict=True):
            if loss is not None:
                part = loss * weight
                total = part if total is None else total + part
        return _with_penalty(self.stand_in() if total is None else total, penalty)

    def without(self, out: Tensor) -> StepLosses:
        """The same losses, those in ``out``, [K] bool, absent."""
        kept = [None if gone else tensor for tensor, gone in zip(self.tensors, out.tolist(), strict=False)]
        values = torch.where(out, torch.nan, self.values)
        return replace(self, tensors=tuple(kept), values=values, present=self.present & ~out)

    def stand_in(self) -> Tensor:
        """A 0 that ``backward()`` accepts and that reaches no parameter: 0 · NaN would still be NaN."""
        like = self.roots[0]
        return torch.zeros((), dtype=like.dtype, device=like.device, requires_grad=torch.is_grad_enabled())


@dataclass(frozen=True)
class StepBuckets(StepLosses):
    """One step's losses in one tensor: nothing is done term by term.

    Args:
        means: [K] live.
    """

    means: Tensor

    def with_all_ranks(self, values: Tensor, present: Tensor) -> StepLosses:
        """As for others; a bucket that is empty here but not on all ranks counts as 0 here."""
        means = self.means.where(self.present.to(self.means.device), 0.0)
        return replace(self, values=values, present=present, means=means)

    @property
    def roots(self) -> list[Tensor]:
        """The one tensor that holds them."""
        return [self.means]

    def live(self, on: Tensor) -> list[Tensor | None]:
        """One view a term that is there and on, None for the others."""
        counted = (self.present & on).tolist()
        return [loss if wanted else None for loss, wanted in zip(self.means.unbind(), counted, strict=True)]

    def total(self, weights: Tensor, on: Tensor, penalty: Tensor | None = None) -> Tensor:
        """Σₖ wₖLₖ over the terms that are there and on, and the penalty; weights are [K] on the host."""
        counted = self.present & on
        # What an empty or broken bucket holds must not reach the sum: 0 · NaN would be NaN.
        held = self.means.where(counted.to(self.means.device), 0.0)
        return _with_penalty((torch.where(counted, weights, 0.0).to(held) * held).sum(), penalty)


def _with_penalty(total: Tensor, penalty: Tensor | None) -> Tensor:
    return total if penalty is None else total + penalty.to(total)


def _check_weights(weights: Mapping[str, float]) -> None:
    if not isinstance(weights, Mapping):
        raise TypeError(f"weights must be a dict of name → start weight, not {type(weights).__name__}")
    if not weights:
        raise ValueError("no terms: give at least one name → start weight")
    for name, weight in weights.items():
        if not isinstance(name, str) or not name:
            raise TypeError(f"a term's name must be a non-empty string, not {name!r}")
        if not isinstance(weight, Real):
            raise TypeError(f"the start weight of term {name!r} is a {type(weight).__name__}: give a finite number ≥ 0")
        if not math.isfinite(weight) or weight < 0:
            raise ValueError(f"the start weight of term {name!r} is {weight}: give a finite number ≥ 0")
    if all(weight == 0 for weight in weights.values()):
        raise ValueError("all start weights are 0: nothing would be trained; give at least one positive weight")


def _values(tensors: list[Tensor | None]) -> Tensor:
    there = [tensor for tensor in tensors if tensor is not None]
    if there[0].device.type == "cpu":
        values = iter([tensor.item() for tensor in there])
    else:
        values = iter(torch.stack([tensor.detach().to(torch.float64) for tensor in there]).cpu().tolist())
    return torch.tensor([math.nan if t is None else next(values) for t in tensors], dtype=torch.float64)
