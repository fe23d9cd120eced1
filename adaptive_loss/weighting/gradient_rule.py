"""What the rules that look at gradients share: when they look, and that a rejected step leaves no trace."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from adaptive_loss.errors import UsageError
from adaptive_loss.events import Event
from adaptive_loss.losses import Terms
from adaptive_loss.weighting.base import Context, Weighting, ones

_NEVER = -1


class GradientRule(Weighting):
    """Weights from the gradients gᵢ of startᵢ·Lᵢ at a tap, refreshed every N accepted steps and held in between.

    A subclass says in :meth:`observe` what its buffers become. Gradients are taken when they are asked for, so between
    refreshes nothing is computed. Under gradient accumulation the first batch counts, whose weights hold for the others
    too. A gradient that is not finite counts as missing.

    Args:
        n_terms: K.
        at: parameters or tensors to take gradients at when a call gives no tap.
        every: N, accepted steps from one refresh to the next.

    Raises:
        ValueError: ``every`` is below 1.
        UsageError: at the first step, a tap that no term depends on.
    """

    family = "gradients"
    needs = ("gradients",)
    held: Tensor
    wait: Tensor

    def __init__(self, n_terms: int, *, at: Tensor | Sequence[Tensor] | None = None, every: int = 1) -> None:
        super().__init__(n_terms)
        if every < 1:
            raise ValueError(f"{type(self).__name__}'s every is {every}: give a number of steps of at least 1")
        self.at = None if at is None else [at] if isinstance(at, Tensor) else list(at)
        self.every = every
        self.register_buffer("held", ones(n_terms))
        self.register_buffer("wait", torch.tensor(_NEVER))
        self._pending: Mapping[str, Any] | None = None

    @abstractmethod
    def observe(self, losses: Tensor, context: Context) -> Mapping[str, Any]:
        """New values of buffers by name, ``held`` among them, as new tensors; nothing to hold all. Changes no state.

        Args:
            losses: [K] float64 values of startᵢ·Lᵢ, NaN where absent.
            context: with gradients.
        """

    def forward(self, losses: Tensor, context: Context) -> Tensor:
        """[K] weights: fresh ones where a refresh is due, else those held."""
        if context.first or self._pending is None:
            self._pending = {} if self.wait > 0 else self._look(losses, context)
        return self._pending.get("held", self.held)

    def _look(self, losses: Tensor, context: Context) -> Mapping[str, Any]:
        assert context.gradients is not None
        if not context.present.any():
            return {}
        if self.wait == _NEVER and not any(part is not None for parts in context.gradients.raw for part in parts):
            raise UsageError(
                f"weighting {self.name!r} needs gradients: no term depends on its tap; "
                "give a tensor or parameters that the losses are computed from, and not in the same compiled graph"
            )
        values = self.observe(losses, context)
        return values if torch.isfinite(values.get("held", self.held)).all() else {}

    def after_step(self, losses: Tensor, context: Context) -> Sequence[Event] | None:
        """Commit what the step's first batch gave."""
        values, self._pending = self._pending or {}, None
        for name, value in values.items():
            setattr(self, name, value)
        if values:
            self.wait = torch.tensor(self.every - 1)
        elif self.wait > 0:
            self.wait = self.wait - 1
        return None

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._pending = None
        super()._load_from_state_dict(*args, **kwargs)


class AgainstBase(GradientRule):
    """A rule that sets auxiliaries by how their gradients compare with the base term's; the base keeps its weight.

    Args:
        n_terms: K.
        only: names of the terms to weigh; None for every auxiliary. The other terms keep their start weights.
        at, every: as for :class:`GradientRule`.

    Raises:
        KeyError: ``only`` names what is no auxiliary term.
    """

    needs = ("gradients", "base")

    def __init__(
        self,
        n_terms: int,
        *,
        only: Sequence[str] | None = None,
        at: Tensor | Sequence[Tensor] | None = None,
        every: int = 1,
    ) -> None:
        super().__init__(n_terms, at=at, every=every)
        self.only = only

    def bind(self, terms: Terms, seed: int) -> None:
        """Find the auxiliaries."""
        super().bind(terms, seed)
        free = [name for name, moves in zip(terms.names, terms.movable.tolist(), strict=True) if moves]
        wanted = free if self.only is None else list(self.only)
        for name in wanted:
            if name not in free:
                raise KeyError(f"{self.name} weighs {name!r}, which is no auxiliary term; those are: {', '.join(free)}")
        self.weighed = torch.tensor([name in wanted for name in terms.names])

    def base(self) -> int:
        """The base term's index."""
        found = self.terms.base_index
        assert found is not None
        return found


def known_norms(context: Context) -> Tensor:
    """[K] ‖gᵢ‖ of startᵢ·Lᵢ, NaN where the term is absent or its gradient is not finite."""
    assert context.gradients is not None
    norms = context.gradients.norms
    return torch.where(context.present & torch.isfinite(norms), norms, torch.nan)


def far_below(averages: Tensor, limit: float) -> Tensor:
    """[K] bool, the averages at or below 1/limit of the greatest; NaN is none.

    Example:
        >>> far_below(torch.tensor([1.0, 1e-3, torch.nan]), 100.0)
        tensor([False,  True, False])
    """
    return averages * limit <= averages.nan_to_num(0.0).max()


def averaged(total: Tensor, weight: Tensor, values: Tensor, decay: float) -> tuple[Tensor, Tensor]:
    """One step of K moving averages mᵢ = totalᵢ/weightᵢ, corrected for their start; NaN entries are left out.

    total ← β·total + (1−β)·x, weight ← β·weight + (1−β), both from 0 on.

    Args:
        total, weight: [K] the state.
        values: x, [K].
        decay: β.

    Returns:
        The new ``total`` and ``weight``.

    Example:
        >>> zero = torch.zeros(2)
        >>> total, weight = averaged(zero, zero, torch.tensor([3.0, torch.nan]), 0.9)
        >>> total / weight
        tensor([3., nan])
    """
    fresh = (~torch.isnan(values)).to(values.dtype) * (1 - decay)
    return total.lerp(values.nan_to_num(0.0, 0.0, 0.0), fresh), weight.lerp(torch.ones_like(weight), fresh)
