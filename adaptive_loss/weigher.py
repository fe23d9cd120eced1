"""From a rule's weights and the modulators' gains to guarded weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adaptive_loss.events import Event
from adaptive_loss.guards import REACH, Guards, first_bad_weight, guard_weights
from adaptive_loss.losses import StepLosses, Terms
from adaptive_loss.modulator import Modulator
from adaptive_loss.step_record import Rejection, Window
from adaptive_loss.weighting.base import Context, Weighting
from adaptive_loss.weighting.fixed import Fixed


class Weigher:
    """log wᵢ = log startᵢ + log ruleᵢ + Σ_modulators gainᵢ, then bounds, rate limit and share cap.

    Without a base the modulators leave the sum of the rule's weights as it is. ``fixed`` without modulators is left
    alone altogether, so that its total is exactly Σᵢ startᵢ·Lᵢ.

    Args:
        terms: the K terms.
        rule: gives the weights that the modulators' gains multiply.
        modulators: each gives [K] log-gains.
        guards: what is bounded.
    """

    def __init__(self, terms: Terms, rule: Weighting, modulators: Sequence[Modulator], guards: Guards) -> None:
        self.terms, self.rule, self.modulators, self.guards = terms, rule, modulators, guards
        self.plain = isinstance(rule, Fixed) and not modulators
        self.free = terms.movable | torch.tensor([name in terms.targets for name in terms.names])
        self.clamped: set[tuple[str, str]] = set()

    def weigh(self, batch: StepLosses, context: Context, window: Window) -> Tensor | Rejection:
        """[K] guarded weights, differentiable where the rule learns them; or why they cannot be used.

        They are guarded on the first batch of a window and held for its others.
        """
        start = self.terms.start_weights
        if self.plain:
            return start
        scaled = torch.where(context.present, batch.values * start, torch.nan)
        ruled = _checked_shape(self.rule(scaled, context), start) * start
        raw = ruled * self._gain()
        bad = first_bad_weight(raw.detach(), self.terms.active)
        if bad is not None:
            return Rejection(f"its weight came out as {float(raw[bad])}", self.terms.names[bad])
        if self.modulators and self.terms.base is None and raw.detach().any():
            raw = raw * (ruled.detach().sum() / raw.detach().sum())
        if window.weights is None:
            self._guard(raw.detach(), batch.values, context, window)
        applied = window.weights
        assert applied is not None
        if not raw.requires_grad:
            return applied
        usable = raw.detach() > 0
        return torch.where(usable, raw * torch.where(usable, applied / raw.detach(), 1.0), applied)

    def _gain(self) -> Tensor:
        gains = torch.zeros_like(self.terms.start_weights)
        for modulator in self.modulators:
            gains = gains + modulator.gains()
        return torch.where(self.free, gains.clamp(-REACH, REACH), torch.zeros_like(gains)).exp()

    def _guard(self, weights: Tensor, values: Tensor, context: Context, window: Window) -> None:
        terms = self.terms
        last = window.before if context.step and not self.rule.jumps else None
        for name, after in guard_weights(self.guards, weights, last, terms.start_weights, values, terms.movable):
            window.stages.append((name, weights, after))
            weights = after
        window.weights = weights

    def clamps(self, window: Window, step: int) -> list[Event]:
        """What the guards began to hold on an accepted step; one that goes on binding is not told again."""
        return [event for stage in window.stages for event in self._begun(*stage, step)]

    def _begun(self, guard: str, before: Tensor, after: Tensor, step: int) -> list[Event]:
        if not self.clamped and torch.equal(before, after):
            return []
        events, changed = [], ((before - after).abs() > 1e-9 * before.abs()).tolist()
        for i, term in enumerate(self.terms.names):
            if not changed[i]:
                self.clamped.discard((guard, term))
            elif (guard, term) not in self.clamped:
                self.clamped.add((guard, term))
                details = {"term": term, "before": float(before[i]), "after": float(after[i])}
                events.append(Event(step, "clamp", f"{guard} holds {term!r}", details))
        return events


def _checked_shape(weights: Tensor, start: Tensor) -> Tensor:
    if weights.shape != start.shape:
        raise ValueError(f"the weighting gave weights of shape {tuple(weights.shape)}: give {tuple(start.shape)}")
    return weights.to("cpu", torch.float64)
