"""Meta-Learning Controller: moves the weights' set-point by a small learned law shared by all terms."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adaptive_loss import signals as signal
from adaptive_loss.cards import read_card
from adaptive_loss.events import Event
from adaptive_loss.guards import REACH
from adaptive_loss.lookahead import Schedule
from adaptive_loss.losses import Terms
from adaptive_loss.modulator import Modulator
from adaptive_loss.weighting.base import Context

POLICIES = Path(__file__).parent / "policies"
EPOCH_STEPS = 200
"""Steps between actions where there is neither a probe nor an ``end_epoch()``."""

_PROGRESS = slice(0, 6)
_TRUST = signal.TERM_FEATURES.index("trust")
_N_TERM = len(signal.TERM_FEATURES)


@dataclass(frozen=True)
class ControllerLaw:
    """The law's parameters, shared by all terms, so that it fits any number of them.

    With φᵢ the term's features, π the six progress features, tᵢ the trust statistic of its look-aheads and
    κᵢ = κ where its weighted gradient is longer than the base's, else 0,
    xᵢ = (tᵢ − κᵢ·t_base)·(η + ⟨trust, π⟩) + ⟨features, φᵢ⟩ + p·⟨late_features, φᵢ⟩ + ⟨drift, π⟩,
    log wᵢ += δ·clip(xᵢ, ±1), δ = early_step in the first 50 steps (a quarter of a shorter run), late_step after,
    p the progress in [0, 1]. At the first look-ahead, once, log wᵢ += −calibration·log(shareᵢ/share_base), the base
    being the mean term where none is declared.

    The rule to start from is η = κ = 1 and everything else 0, with steps of 0.7 and 0.35 nats.

    Args:
        gain: η.
        against_base: κ, how far a term that has outgrown the base must do better than it (t_base is 0 where none is
            declared). The base's own weight stays put, so its pull can only show as the others' retreat; without it a
            term that dominates the whole gradient has nothing left to hold it back.
        early_step, late_step: δ, in nats.
        calibration: 0 leaves the start weights, 1 makes all weighted gradients as long as the base's.
        trust: [6] how progress changes the trust in a look-ahead.
        features, late_features: [9] what each term feature adds, throughout and towards the end.
        drift: [6] what progress adds to every auxiliary.
    """

    gain: float = 1.0
    against_base: float = 1.0
    early_step: float = 0.7
    late_step: float = 0.35
    calibration: float = 0.0
    trust: tuple[float, ...] = (0.0,) * 6
    features: tuple[float, ...] = (0.0,) * _N_TERM
    late_features: tuple[float, ...] = (0.0,) * _N_TERM
    drift: tuple[float, ...] = (0.0,) * 6

    def to_vector(self) -> list[float]:
        """All parameters in field order, as the evolution strategy sees them."""
        flat: list[float] = []
        for value in asdict(self).values():
            flat += list(value) if isinstance(value, tuple) else [value]
        return flat

    @classmethod
    def from_vector(cls, vector: list[float]) -> ControllerLaw:
        """The inverse of :meth:`to_vector`."""
        rest = iter(vector)
        values: dict[str, Any] = {
            name: tuple(next(rest) for _ in value) if isinstance(value, tuple) else next(rest)
            for name, value in asdict(cls()).items()
        }
        return cls(**values)

    @classmethod
    def load(cls, file: Path) -> ControllerLaw:
        """Read a law from its JSON file.

        Raises:
            ValueError: the file is damaged, or was made for signals of another version.
        """
        return read_card(file, "the controller's law", lambda card: cls._checked(card["law"]), signal.VERSION)

    @classmethod
    def _checked(cls, law: Mapping[str, Any]) -> ControllerLaw:
        """A law from a file's mapping, every parameter a finite number or as many of them as there should be."""
        values = {name: _like(default, law[name], name) for name, default in asdict(cls()).items()}
        return cls(**values)


def _like(default: Any, value: Any, name: str) -> Any:
    numbers = [float(v) for v in value] if isinstance(default, tuple) else [float(value)]
    wanted = len(default) if isinstance(default, tuple) else 1
    if len(numbers) != wanted or not all(math.isfinite(v) for v in numbers):
        raise ValueError(f"{name!r} must be {wanted} finite number{'s' * (wanted > 1)}")
    return tuple(numbers) if isinstance(default, tuple) else numbers[0]


RULE = ControllerLaw()
"""The gauge-projected, front-loaded look-ahead rule on its own."""

ZERO = ControllerLaw(gain=0.0, early_step=0.0, late_step=0.0)
"""A law that never moves a weight."""


class MetaController(Modulator):
    """Applies a learned adaptation strategy: acts at every look-ahead and, without any, at every epoch's end.

    Args:
        law: its parameters; None takes the meta-trained ones that come with the package.

    Example:
        >>> from adaptive_loss import LossExecutor, MetaController
        >>> executor = LossExecutor({"ce": 1.0, "mix": 1.0}, base="ce", modulators=[MetaController()],
        ...                         probe=lambda: torch.ones((), requires_grad=True))
        >>> executor.weights
        {'ce': 1.0, 'mix': 1.0}
    """

    def __init__(self, law: ControllerLaw | None = None) -> None:
        self.law = ControllerLaw.load(POLICIES / "controller.json") if law is None else law

    @classmethod
    def from_policy(cls, folder: str | Path | None) -> MetaController:
        """The controller of a policy folder; None is the package's own."""
        return cls(ControllerLaw.load(Path(folder or POLICIES) / "controller.json"))

    def bind(self, terms: Terms, total_steps: int | None, seed: int) -> None:
        """Start at the start weights."""
        super().bind(terms, total_steps, seed)
        self.last_action = 0
        self.told_of_epochs = False

    def after_step(self, context: Context) -> list[Event]:
        """Act on a new look-ahead; without a probe, every 200 steps unless epochs are told."""
        since = context.step - self.last_action
        alone = _blind(context) and not self.told_of_epochs and since >= EPOCH_STEPS
        return self._act(context, looked=context.looked) if context.looked or alone else []

    def end_epoch(self, context: Context, metrics: Mapping[str, float]) -> list[Event]:
        """Act at an epoch's end where there is nothing to look ahead to."""
        self.told_of_epochs = True
        return self._act(context, looked=False) if _blind(context) else []

    def _act(self, context: Context, looked: bool) -> list[Event]:
        before = self.log_gain
        moved = before
        if looked and context.signals.look_aheads == 1:
            moved = moved - self._calibration(context)
        moved = moved + self._step_size(context) * self._urge(context, looked).clamp(-1, 1)
        moved = torch.where(self.terms.movable & context.on, moved, before).clamp(-REACH, REACH)
        self.log_gain, self.last_action = moved, context.step
        change = (moved - before).tolist()
        if not any(change):
            return []
        details = {
            "change": dict(zip(self.terms.names, change, strict=True)),
            "trust": dict(zip(self.terms.names, context.signals.trust.tolist(), strict=True)),
        }
        return [Event(context.step, "controller", "look-ahead" if looked else "epoch", details)]

    def _urge(self, context: Context, looked: bool) -> Tensor:
        """[K] xᵢ of the law."""
        law, progress = self.law, min(1.0, context.signals.progress or 0.0)
        terms = context.signals.term_features(context.weights, context.weights, context.start)
        phases = context.signals.global_features()[_PROGRESS]
        trust = self._relative_trust(context) if looked else torch.zeros(len(terms), dtype=torch.float64)
        gain = law.gain + float(phases @ _vector(law.trust))
        linear = terms @ (_vector(law.features) + progress * _vector(law.late_features))
        return trust * gain + linear + float(phases @ _vector(law.drift))

    def _relative_trust(self, context: Context) -> Tensor:
        trust, share, base = context.signals.trust, context.signals.share, self.terms.base_index
        if base is None:
            return trust
        return torch.where(share > share[base], trust - self.law.against_base * trust[base], trust)

    def _step_size(self, context: Context) -> float:
        # The clock has moved on since the look-ahead of the step before.
        early = context.step - 1 <= Schedule().edge(self.total_steps)
        return self.law.early_step if early else self.law.late_step

    def _calibration(self, context: Context) -> Tensor:
        share = context.signals.share.clamp_min(1e-12).log()
        base = self.terms.base_index
        reference = share[context.on].mean() if base is None else share[base]
        return self.law.calibration * (share - reference)

    def state_dict(self) -> dict[str, Any]:
        """Gains and the clock of actions; the law itself is a setting, not state."""
        return super().state_dict() | {"last_action": self.last_action, "told_of_epochs": self.told_of_epochs}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        super().load_state_dict(state)
        self.last_action, self.told_of_epochs = state["last_action"], state["told_of_epochs"]


def _blind(context: Context) -> bool:
    """Whether there is no probe, or none of its look-aheads has come: its graph is lost, or it is never finite."""
    return context.objective is None or context.signals.look_aheads == 0


def _vector(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
