"""Gradient gate: what stands between ``backward()`` and ``optimizer.step()``."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from adaptive_loss.gradients import dense_values, leaves, term_gradients, total_norm
from adaptive_loss.guards import largest_norm
from adaptive_loss.parallel import Group, greatest, mean, share_overflow, worst_norm
from adaptive_loss.step_record import Rejection, Window

_ROOM = 10
"""Second moments may add up the squares of a hundred gradients at the limit."""
_FEW = 32
"""Terms up to which each one's gradient is taken to find whose was bad: it costs a backward pass a term."""


class GradientGate:
    """One optimizer's gradients: unscaled, measured and clipped, then stepped on or held back.

    A gradient whose square overflows is as bad as one that is not finite: a second moment (Adam, RMSprop, Adagrad) that
    has once become ∞ stays so, and its parameter never moves again.

    Args:
        optimizer: holds the gradients of ``backward()``.
        scaler: the GradScaler that scaled the loss, or None.
        clip_norm: greatest norm that reaches the optimizer, or None.
        group: the ranks that train together, all of which hold back what one must.

    Attributes:
        norm: Euclidean norm before clipping, taken at least in float32, the greatest over ranks.
        clipped: whether the gradients were scaled down.
        limit: greatest norm that the optimizer may see.
        fault: why it must not see them, or None.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        scaler: torch.amp.GradScaler | None,
        clip_norm: float | None,
        group: Group = None,
    ) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        scales = scaler is not None and scaler.is_enabled() and bool(gradients)
        self.optimizer, self.scaler = optimizer, scaler if scales else None
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)
            share_overflow(self.scaler, optimizer, group)
        dense = dense_values(gradients)
        self.norm = worst_norm(largest_norm(dense, total_norm(dense)), group)
        self.clipped = _clip(gradients, self.norm, clip_norm)
        self.limit = greatest_norm(gradients)
        self.fault = None if self.clipped else _fault(self.norm, self.limit)

    @property
    def overflow(self) -> bool:
        """Whether the gradients are too large for the scaler's present scale, which is its business to lower."""
        return self.scaler is not None and not math.isfinite(self.norm)

    @property
    def exhausted(self) -> bool:
        """Whether the scaler has no scaling left to lower, so that the next bad gradient is no overflow."""
        return self.scaler is not None and self.scaler.get_scale() < 1

    def rejection(self, window: Window, names: Sequence[str], weights: Tensor) -> Rejection | None:
        """Why the optimizer must not see the gradients, and whose they are where that was measured, or None.

        Elsewhere the term with the greatest weighted loss is named, the first to look at.

        Args:
            window: the forward passes that they come from.
            names: of the K terms.
            weights: [K] applied.
        """
        if self.fault is None:
            return None
        if window.norms is None:
            mass = (window.means() * weights).abs().nan_to_num(-1.0)
            return Rejection(self.fault, names[int(mass.argmax())] if window.batches else None, "gradient")
        bad = (window.norms > self.limit).tolist()
        culprits = tuple(name for name, is_bad in zip(names, bad, strict=True) if is_bad)
        worst = names[int(window.norms.argmax())] if culprits else None
        return Rejection(self.fault, worst, "gradient", culprits)

    def step(self) -> None:
        """Let the optimizer step; the scaler skips an overflow by itself and lowers its scale."""
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()

    def hold(self) -> None:
        """Leave the optimizer as it is, and the scaler ready for the next step."""
        if self.scaler is not None:
            self.scaler.update()


def greatest_norm(gradients: Sequence[Tensor]) -> float:
    """The greatest gradient norm whose square an optimizer's second moment can hold, 1.8e18 in float32."""
    limits = [torch.finfo(torch.promote_types(kind, torch.float32)).max for kind in {g.dtype for g in gradients}]
    return math.sqrt(min(limits, default=math.inf)) / _ROOM


def note_norms(window: Window, losses: Sequence[Tensor | None], weights: Tensor, group: Group = None) -> None:
    """Measure the terms' own gradients, so that one that is bad has a name, where they are few and the graph allows it.

    Args:
        window: where the greatest of its batches is noted.
        losses, weights: as for :func:`weighted_norms`.
        group: the ranks that train together; the greatest over them counts.
    """
    if len(losses) > _FEW:
        return
    try:
        norms = weighted_norms(losses, weights)
    except RuntimeError:  # a compiled graph, or one whose second backward is refused
        norms = None
    # One that is lost on some rank is lost on all.
    if mean(float(norms is None), group) or norms is None:
        return
    norms = greatest(norms, group)
    window.norms = norms if window.norms is None else torch.maximum(window.norms, norms)


def weighted_norms(losses: Sequence[Tensor | None], weights: Tensor) -> Tensor:
    """[K] ‖wᵢ∇Lᵢ‖ over all that each loss depends on, ∞ where it is not finite, 0 where the term is absent.

    One backward pass a term; the graph is kept for the user's own.

    Args:
        losses: K live terms, None where absent or off.
        weights: [K] w.

    Raises:
        RuntimeError: the graph cannot be kept.
    """
    found = [0.0 if loss is None else _norm(loss) for loss in losses]
    return (torch.tensor(found, dtype=torch.float64) * weights).nan_to_num(math.inf, math.inf)


def _norm(loss: Tensor) -> float:
    at = leaves(loss)
    parts = term_gradients([loss], at)[0] if at else []
    there = [part for part in parts if part is not None]
    return largest_norm(there, total_norm(there))


def _clip(gradients: Sequence[Tensor], norm: float, limit: float | None) -> bool:
    if limit is None or not math.isfinite(norm) or norm <= limit:
        return False
    for gradient in gradients:
        gradient.mul_(limit / norm)
    return True


def _fault(norm: float, limit: float) -> str | None:
    if not math.isfinite(norm):
        return "the gradient is not finite"
    return None if norm <= limit else f"the gradient's norm is {norm:.6g}, an optimizer cannot hold its square"
