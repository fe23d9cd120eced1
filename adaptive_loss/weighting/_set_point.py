"""What the rules have in common that hold terms at their targets; no rule itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from adaptive_loss.events import Event
from adaptive_loss.knob import Knob, Law, Limits, Saturation, reported, unreached
from adaptive_loss.losses import Terms
from adaptive_loss.weighting.base import Context, Weighting, ones


class HeldTargets(Weighting):
    """One knob a term with a target: its value is the rule's weight; every other term's is 1.

    A knob observes the term's loss in the user's units and moves once an accepted step on which the term was there.
    An error in absolute units is startᵢ·(Lᵢ − τᵢ), the constraint as it stands in the total, so that a start weight
    does the same as the loss and target in other units.

    Args:
        n_terms: K.
        law: of every knob.
        limits: bounds, slew limit, dead band, warm-up and alarm of every knob.
        value, integral: where every knob and its integral start.
        decay: of the average of every knob's error.
    """

    family = "set-point"
    needs = ("targets",)
    holds_targets = True

    def __init__(
        self,
        n_terms: int,
        law: Law,
        limits: Limits,
        *,
        value: float = 1.0,
        integral: float = 0.0,
        decay: float = 0.0,
    ) -> None:
        super().__init__(n_terms)
        if limits.bounds[0] < 0:
            raise ValueError(f"{type(self).__name__} got bounds {limits.bounds}: a weight cannot be negative")
        self.law, self.limits, self.value, self.integral, self.decay = law, limits, value, integral, decay
        self.knobs: dict[str, Knob] = {}
        self.alarms: list[Saturation] = []

    def bind(self, terms: Terms, seed: int) -> None:
        """Make the knobs."""
        super().bind(terms, seed)
        self.knobs = {name: self._knob(name, target) for name, target in terms.targets.items()}

    def _knob(self, name: str, target: float) -> Knob:
        return Knob(
            self.law,
            target=target,
            value=self.value,
            name=f"weighting {self.name!r}: the weight of {name!r}",
            scale=self.scale(self.terms.start[name], target),
            decay=self.decay,
            integral=self.integral,
            limits=self.limits,
            on_alarm=self.alarms.append,
        )

    def scale(self, start: float, target: float) -> float:
        """What a term's L − τ is multiplied by."""
        return start

    def forward(self, losses: Tensor, context: Context) -> Tensor:
        """[K] the knobs' values, which change after accepted steps only."""
        weights = ones(self.n_terms)
        for name, knob in self.knobs.items():
            weights[self.terms.names.index(name)] = knob.value
        return weights

    def after_step(self, losses: Tensor, context: Context) -> Sequence[Event]:
        """Let every knob observe its loss; an absent one's is NaN, which changes nothing. Reports their alarms."""
        for name, knob in self.knobs.items():
            i = self.terms.names.index(name)
            knob.observe(float(losses[i] / context.start[i]))
        return reported(self.alarms, context.step)

    def unreached(self) -> Mapping[str, str]:
        """The terms whose knobs stand at a bound."""
        return unreached(self.knobs)

    def get_extra_state(self) -> dict[str, Any]:
        """The knobs' state, as numbers."""
        return {name: knob.state_dict() for name, knob in self.knobs.items()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`get_extra_state`."""
        if set(state) != set(self.knobs):
            raise ValueError(f"weighting {self.name!r}: the state is of {sorted(state)}, here {sorted(self.knobs)}")
        for name, knob in self.knobs.items():
            knob.load_state_dict(state[name])
