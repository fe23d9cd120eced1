"""Safe switch-on of a term: armed, ramped, capped, and taken back if the base suffers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from adaptive_loss.events import Event
from adaptive_loss.losses import Terms
from adaptive_loss.weighting import weightings
from adaptive_loss.weighting.base import Context, Weighting, ones

OFF = -1


def ramp(step: int, since: int, length: int) -> float:
    """min(1, (step − since + 1)/length): linear from 1/length on the first step on to 1; a length of 0 is a jump."""
    return min(1.0, (step - since + 1) / max(length, 1))


def capped_by_share(weights: Tensor, norms: Tensor, term: int, share: float) -> float:
    """The greatest wᵢ at which term i holds no more than ``share`` of the weighted gradients' lengths.

    wᵢ‖gᵢ‖ ≤ share·Σⱼ wⱼ‖gⱼ‖, so wᵢ = share/(1 − share) · Σ_{j≠i} wⱼ‖gⱼ‖ / ‖gᵢ‖; ∞ where gᵢ is 0.

    Args:
        weights: [K] w.
        norms: [K] ‖gⱼ‖ at weight 1.
        term: i.
        share: in (0, 1).

    Example:
        >>> capped_by_share(torch.tensor([2.0, 1.0]), torch.tensor([1.0, 10.0]), 1, 0.5)
        0.2
    """
    lengths = weights * norms
    own, rest = float(norms[term]), float(lengths.sum() - lengths[term])
    return share / (1 - share) * rest / own if own > 0 else math.inf


@weightings.register("switch_on")
class SwitchOn(Weighting):
    """Keeps one term off until it is armed, ramps it in, caps its share, and takes it back if the base worsens.

    wᵢ = 0 before, then min(1, (t − t₀ + 1)/ramp), with t₀ the step of the switch; and never above the weight at which
    term i holds ``share`` of the weighted gradients' lengths at the tap, other rules of a product included. If the
    base's running loss rises above ``bound`` times what it was at t₀, the term goes off again and may come back after
    ``rest`` steps, twice as long each time.

    Reference: the switch-on of the discriminator in Esser, Rombach & Ommer, "Taming Transformers", CVPR 2021, which has
    neither ramp nor way back, and gates the discriminator's own loss by the same 0, so that it is untrained when its
    gradient begins to count: here only this term waits, so train the opponent from the first step, or from
    :attr:`opponent` on.

    Choose it when an adversarial, perceptual or alignment term would wreck a model that cannot draw yet. Multiply it to
    a rule: ``SwitchOn(2, "adversarial", at=10_000, ramp=1_000) * VQGAN(2)``. Metrics it logs: the weights, and an event
    when it switches and when it goes back. Deviations: as said above.

    Args:
        n_terms: K.
        term: the name of the term that waits.
        at: the optimizer step from which it may come.
        epoch: the number of ended epochs from which it may come.
        when: a condition on the :class:`Context`; all of ``at``, ``epoch`` and ``when`` that are given must hold.
        ramp: steps until it has its full weight.
        share: greatest share of the gradients' lengths it may hold, in (0, 1); needs a tap. None: no cap.
        bound: how far the base's running loss may rise before the term is taken back, above 1. None: never.
        rest: steps until it may come back.
        lead: steps before ``at`` from which :attr:`opponent` is true.

    Raises:
        ValueError: a time, share, bound, ramp, rest or lead that cannot be.
        KeyError: at the executor's construction, a term that is not there.

    Example:
        >>> import torch
        >>> from adaptive_loss import LossExecutor
        >>> from adaptive_loss.weighting.switch_on import SwitchOn
        >>> executor = LossExecutor({"rec": 1.0, "adv": 0.5}, base="rec", weighting=SwitchOn(2, "adv", at=2, ramp=4))
        >>> w = torch.nn.Parameter(torch.tensor(1.0))
        >>> optimizer, seen = torch.optim.SGD([w], lr=0.0), []
        >>> for _ in range(8):
        ...     executor({"rec": w**2, "adv": w}).backward()
        ...     seen.append(round(executor.step(optimizer).weights["adv"], 3))
        >>> seen
        [0.0, 0.0, 0.125, 0.25, 0.375, 0.5, 0.5, 0.5]
    """

    family = "switch"
    needs = ("a term",)
    jumps = True  # from nothing to something is no rate
    state: Tensor

    def __init__(
        self,
        n_terms: int,
        term: str | None = None,
        *,
        at: int | None = None,
        epoch: int | None = None,
        when: Callable[[Context], bool] | None = None,
        ramp: int = 0,
        share: float | None = None,
        bound: float | None = None,
        rest: int = 1000,
        lead: int = 0,
    ) -> None:
        super().__init__(n_terms)
        if share is not None and not 0 < share < 1:
            raise ValueError(f"SwitchOn's share is {share}: give a number between 0 and 1, or None for no cap")
        if bound is not None and not bound > 1:
            raise ValueError(f"SwitchOn's bound is {bound}: give a factor above 1, or None for no way back")
        if min(at or 0, epoch or 0) < 0:
            raise ValueError(f"SwitchOn's time is at={at}, epoch={epoch}: give 0 or more")
        if ramp < 0 or rest < 1 or lead < 0:
            raise ValueError(f"SwitchOn's ramp {ramp} and lead {lead} must be at least 0, its rest {rest} at least 1")
        self.term, self.at_step, self.epoch, self.when = term, at, epoch, when
        self.length, self.share, self.bound, self.rest, self.lead = ramp, share, bound, rest, lead
        wanted = {"gradients": share is not None, "base": bound is not None, "epochs": epoch is not None}
        self.needs = ("a term", *(need for need, is_wanted in wanted.items() if is_wanted))
        # since, reference, not before, times taken back, epochs, last step
        self.register_buffer("state", torch.tensor([OFF, math.nan, 0, 0, 0, 0], dtype=torch.float64))

    def bind(self, terms: Terms, seed: int) -> None:
        """Find the term."""
        super().bind(terms, seed)
        if self.term is not None and self.term not in terms.names:
            raise KeyError(f"SwitchOn's term {self.term!r} is not a term; the terms are: {', '.join(terms.names)}")

    def unmet(self, context: Context) -> str | None:
        """The term and when it may come, where it was made without."""
        if self.term is None or (self.at_step is None and self.epoch is None and self.when is None):
            how = "make it with SwitchOn(n_terms, term, at=step), or epoch=, or when="
            return f"weighting 'switch_on' needs a term and a time: {how}"
        return super().unmet(context)

    @property
    def on(self) -> bool:
        """Whether the term counts now."""
        return float(self.state[0]) != OFF

    @property
    def opponent(self) -> bool:
        """Whether the opposing network should train now: from ``lead`` steps before the term may come."""
        return self.on or float(self.state[5]) >= (self.at_step or 0) - self.lead

    def forward(self, losses: Tensor, context: Context) -> Tensor:
        """[K] ones, but for the term."""
        weights = ones(self.n_terms)
        weights[self._index] = ramp(context.step, int(self.state[0]), self.length) if self.on else 0.0
        return weights

    def let_through(self, weights: Tensor, context: Context) -> Tensor:
        """[K] the weights, the term's capped by its share of the gradients' lengths."""
        i = self._index
        if self.share is None or context.gradients is None or not context.present[i] or not weights[i]:
            return weights
        weights = weights.clone()
        weights[i] = min(float(weights[i]), capped_by_share(weights, context.gradients.norms, i, self.share))
        return weights

    @property
    def _index(self) -> int:
        assert self.term is not None
        return self.terms.names.index(self.term)

    def after_step(self, losses: Tensor, context: Context) -> Sequence[Event]:
        """Switch on, or take back."""
        self.state = self.state.clone()
        self.state[5] = context.step
        base = self.terms.base_index
        level = math.nan if base is None else float(context.signals.fast[base])
        if not self.on:
            return self._switch(context, level) if self._ready(context) else ()
        return self._take_back(context, level) if self._worse(level) else ()

    def _ready(self, context: Context) -> bool:
        since = context.step >= max(self.at_step or 0, float(self.state[2]))
        epochs = float(self.state[4]) >= (self.epoch or 0)
        return since and epochs and (self.when is None or bool(self.when(context)))

    def _worse(self, level: float) -> bool:
        reference = float(self.state[1])
        return self.bound is not None and level - reference > (self.bound - 1) * abs(reference)

    def _switch(self, context: Context, level: float) -> list[Event]:
        self.state[0], self.state[1] = context.step, level
        return [Event(context.step, "switch", f"{self.term!r} comes on", {"term": self.term, "base": level})]

    def _take_back(self, context: Context, level: float) -> list[Event]:
        rest = self.rest * 2 ** int(self.state[3])
        details = {"term": self.term, "before": float(self.state[1]), "after": level, "rest": rest}
        self.state[0], self.state[2] = OFF, context.step + rest
        self.state[3] += 1
        return [Event(context.step, "switch", f"{self.term!r} goes off: the base worsened", details)]

    def end_epoch(self, metrics: Mapping[str, float]) -> None:
        """Count."""
        self.state = self.state.clone()
        self.state[4] += 1
