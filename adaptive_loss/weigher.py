"""From a rule's weights and the modulators' gains to guarded weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from adaptive_loss.events import Event
from adaptive_loss.guards import REACH, Guards, first_bad_weight, guard_weights
from adaptive_loss.losses import StepLosses, Terms
from adaptive_loss.modulator import Modulator
from adaptive_loss.step_record import Rejection, Window
from adaptive_loss.weighting.base import Context, Weighting
from adaptive_loss.weighting.fixed import Fixed

_OWN = "rule"
ALARM_AFTER = 1000
"""Accepted steps in a row on which a guard holds a term's weight before an alarm says so."""


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
        self.held: dict[tuple[str, str], int] = {}
        self._scale, self._zeros = terms.start_weights * terms.unit, torch.zeros_like(terms.start_weights)
        self._off, self._all = ~terms.active, torch.ones_like(terms.active)

    def weigh(self, batch: StepLosses, context: Context, window: Window) -> Tensor | Rejection:
        """[K] guarded weights, differentiable where the rule learns them; or why they cannot be used.

        They are guarded on the first batch of a window and held for its others.
        """
        start = self.terms.start_weights
        if self.plain:
            return start
        given = _checked_shape(self.rule(batch.values * self._scale, context), start)
        ruled = self.rule.let_through(given.detach(), context) * start
        raw = ruled * self._gain() if self.modulators else ruled
        bad = first_bad_weight(raw, self.terms.active)
        if bad is not None:
            return Rejection(f"its weight came out as {float(raw[bad])}", self.terms.names[bad], "weight")
        if self.modulators and self.terms.base is None and raw.any():
            raw = raw * (ruled.sum() / raw.sum())
        if window.weights is None:
            self._guard(raw, batch.values, context, window)
        applied = window.weights
        assert applied is not None
        # A rule that learns does so as if it were alone: else it would learn away what modulators and guards do.
        return applied + (given - given.detach()) * start if given.requires_grad else applied

    def _gain(self) -> Tensor:
        gains = sum((modulator.gains() for modulator in self.modulators), self._zeros)
        return torch.where(self.free, gains.clamp(-REACH, REACH), self._zeros).exp()

    def _guard(self, weights: Tensor, values: Tensor, context: Context, window: Window) -> None:
        terms = self.terms
        last = window.before if context.step and not self.rule.jumps else None
        for name, after in guard_weights(self.guards, weights, last, terms.start_weights, values, terms.movable):
            window.stages.append((name, weights, after))
            weights = after
        # A rule knows nothing of an absent term: what it had last stands.
        window.weights = torch.where(context.present | self._off, weights, window.before)

    def clamps(self, window: Window, step: int) -> list[Event]:
        """What the guards began to hold on an accepted step, and what they have held for long; nothing in between."""
        told = [event for stage in window.stages for event in self._told(*stage, window, step)]
        return told + self._saturated(window, step)

    def _told(self, guard: str, before: Tensor, after: Tensor, window: Window, step: int) -> list[Event]:
        if after is before:
            self._let_go(guard, self._all)
            return []
        events, changed = [], (before - after).abs() > 1e-9 * before.abs()
        self._let_go(guard, ~changed)
        for i in changed.nonzero().flatten().tolist():
            term = self.terms.names[i]
            steps = self.held[guard, term] = self.held.get((guard, term), 0) + 1
            if steps in (1, ALARM_AFTER):
                asked, given, loss = float(before[i]), float(after[i]), float(window.means()[i])
                details = {"term": term, "before": asked, "after": given, "loss": loss, "steps": steps}
                events.append(Event(step, *_clamped(guard, details), details))
        return events

    def _saturated(self, window: Window, step: int) -> list[Event]:
        """One alarm for each weight that has long stood at a bound of its rule's own; an absent term waits."""
        stands = self.rule.saturated()
        if stands is None:
            return []
        self._let_go(_OWN, window.present & ~stands)
        events = []
        for i in (stands & window.present).nonzero().flatten().tolist():
            key = (_OWN, self.terms.names[i])
            self.held[key] = self.held.get(key, 0) + 1
            if self.held[key] == ALARM_AFTER:
                events.append(self._alarm(i, window, step))
        return events

    def _let_go(self, guard: str, free: Tensor) -> None:
        """Forget that a guard held the terms that are ``free``, [K] bool."""
        held = [key for key in self.held if key[0] == guard]
        is_free = free.tolist() if held else []
        for key in held:
            if is_free[self.terms.places[key[1]]]:
                del self.held[key]

    def _alarm(self, i: int, window: Window, step: int) -> Event:
        assert window.weights is not None
        details = {"term": self.terms.names[i], "weight": float(window.weights[i]), "loss": float(window.means()[i])}
        held = (
            f"weighting {self.rule.name!r} has held {details['term']!r} at a bound of its own for {ALARM_AFTER} steps"
        )
        seen = f"at a weight of {details['weight']:.6g} and a loss of {details['loss']:.6g}"
        return Event(step, "alarm", f"{held}, {seen}: look at that term", {**details, "steps": ALARM_AFTER})


def _clamped(guard: str, details: Mapping[str, Any]) -> tuple[str, str]:
    """Kind and reason of the event about a weight that a guard holds."""
    term = details["term"]
    if details["steps"] == 1:
        return "clamp", f"{guard} holds {term!r}"
    asked, given = f"{details['before']:.6g}", f"{details['after']:.6g}"
    wait = f"{guard} has held {term!r} at {given} for {details['steps']} steps, {asked} is asked for"
    return "alarm", f"{wait}, at a loss of {details['loss']:.6g}: widen the guard or look at that term"


def _checked_shape(weights: Tensor, start: Tensor) -> Tensor:
    if weights.shape != start.shape:
        raise ValueError(f"the weighting gave weights of shape {tuple(weights.shape)}: give {tuple(start.shape)}")
    return weights.to("cpu", torch.float64)
