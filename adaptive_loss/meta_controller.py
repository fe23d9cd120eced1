"""Meta-Learning Controller: moves the weights' set-point by a small learned law shared by all terms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adaptive_loss import signals as signal
from adaptive_loss.events import Event
from adaptive_loss.gradients import length_ratio
from adaptive_loss.guards import REACH
from adaptive_loss.lookahead import Schedule
from adaptive_loss.losses import Terms
from adaptive_loss.modulator import Modulator
from adaptive_loss.policy_files import POLICIES, check_like, read_policy, refusing
from adaptive_loss.signals import Recall
from adaptive_loss.weighting.base import Context

Array = NDArray[np.float64]
EPOCH_STEPS = 200
"""Steps between actions where there is neither a probe nor an ``end_epoch()``."""

_CLIMBS_IN = 16
"""Steps in which a law that climbs has its early look-aheads: it needs no time to see that it has gone too far."""
_ROUNDS = 8
"""Parts of a move, after each of which a law that climbs asks anew."""

_PROGRESS = slice(0, 6)
_N_TERM = len(signal.TERM_FEATURES)


@dataclass(frozen=True)
class ControllerLaw:
    """The law's parameters, shared by all terms, so that it fits any number of them.

    With φᵢ the term's features, π the six progress features, tᵢ the trust statistic of its look-aheads and
    κᵢ = κ where its weighted gradient is longer than the base's, else 0,
    xᵢ = (tᵢ − κᵢ·t_base)·(η + ⟨trust, π⟩) + ⟨features, φᵢ⟩ + p·⟨late_features, φᵢ⟩ + ⟨drift, π⟩,
    log wᵢ += δ·b(xᵢ), b(x) = sign(x)·clip((|x| − τ)/(1 − τ), 0, 1), p the progress in [0, 1],
    δ = early_step and τ = early_band in a term's first steps, late_step and late_band after. At the first look-ahead,
    once, log wᵢ += −calibration·log(shareᵢ/share_base), the base being the mean term where none is declared.

    A law that ``climbs`` makes that move in eight parts and asks after each of them what the remembered look-aheads
    would have said at the weights it has come to (:class:`~adaptive_loss.signals.Recall`). So it goes as far
    as the evidence reaches and stops there: it overshoots less and, from right weights, walks less with the noise. It
    raises no term above its start weight whose weighted gradient is longer than the base's already, and where the
    whole gradient's length has changed, it tells the optimizer's memory
    (:func:`~adaptive_loss.optimizer_memory.rescale_memory`). A term that comes in mid-run, as an adversarial one does,
    meets a model that was trained without it: at its first look-ahead its weight is lowered until its gradient is no
    longer than the base's, and its first steps have early look-aheads and steps of their own.

    Args:
        gain: η.
        against_base: κ, how far a term that has outgrown the base must do better than it (t_base is 0 where none is
            declared). The base's own weight stays put, so its pull can only show as the others' retreat; without it a
            term that dominates the whole gradient has nothing left to hold it back.
        early_step, late_step: δ, in nats.
        calibration: 0 leaves the start weights, 1 makes all weighted gradients as long as the base's.
        early_band, late_band: τ in [0, 1), how far x must be from 0 to count. Of a trust, 0.55 of two to four
            look-aheads and 0.4 of nine or more are what a two-sided t-test finds in a fifth of all draws of pure noise.
        trust: [6] how progress changes the trust in a look-ahead.
        features, late_features: [9] what each term feature adds, throughout and towards the end.
        drift: [6] what progress adds to every auxiliary.
        climbs: whether it asks anew on the way; not among the parameters that are learned.
    """

    gain: float = 1.0
    against_base: float = 1.0
    early_step: float = 0.7
    late_step: float = 0.35
    calibration: float = 0.0
    early_band: float = 0.0
    late_band: float = 0.0
    trust: tuple[float, ...] = (0.0,) * 6
    features: tuple[float, ...] = (0.0,) * _N_TERM
    late_features: tuple[float, ...] = (0.0,) * _N_TERM
    drift: tuple[float, ...] = (0.0,) * 6
    climbs: bool = False

    def to_vector(self) -> list[float]:
        """All learned parameters in field order, as the evolution strategy sees them."""
        flat: list[float] = []
        for value in self._learned().values():
            flat += list(value) if isinstance(value, tuple) else [value]
        return flat

    def with_vector(self, vector: list[float]) -> ControllerLaw:
        """The inverse of :meth:`to_vector`, for a law of this kind."""
        rest = iter(vector)
        values: dict[str, Any] = {
            name: tuple(next(rest) for _ in value) if isinstance(value, tuple) else next(rest)
            for name, value in self._learned().items()
        }
        return replace(self, **values)

    def _learned(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if not isinstance(value, bool)}

    def tensors(self) -> dict[str, Tensor]:
        """Every learned parameter by its name, float64: a number [], several [6] or [9]. With ``climbs``, all of it."""
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in self._learned().items()}

    @classmethod
    def load(cls, card_file: Path) -> ControllerLaw:
        """Read a law from its card, which says whether it ``climbs``, and the tensors beside it.

        Raises:
            ValueError: one of the files is damaged or not the law's, or was made for signals of another version.
        """
        card, tensors = read_policy(card_file.parent, card_file.stem)
        with refusing(card_file):
            check_like(tensors, cls().tensors())
            if not isinstance(card["climbs"], bool):
                raise ValueError("'climbs' must be true or false")
            values = {name: tuple(t.tolist()) if t.dim() else t.item() for name, t in tensors.items()}
            return cls(**cast("dict[str, Any]", values), climbs=card["climbs"]).checked()

    def checked(self) -> ControllerLaw:
        """The law itself, or a ``ValueError`` that names a number with which a move could be none."""
        limits = {"step": REACH, "band": 0.99}
        ranges = {f"{age}_{what}": limits[what] for age in ("early", "late") for what in limits}
        for name, most in {**ranges, "against_base": 1.0, "calibration": 1.0}.items():
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(f"its {name} is {getattr(self, name):g}: it must lie in [0, {most:.3g}]")
        return self


RULE = ControllerLaw()
"""The gauge-projected, front-loaded look-ahead rule on its own."""

CLIMB = ControllerLaw(early_step=1.4, late_step=0.35, early_band=0.55, late_band=0.4, climbs=True)
"""The law that asks its look-aheads anew at every weight it comes to, and stops where they do."""

ZERO = ControllerLaw(gain=0.0, early_step=0.0, late_step=0.0)
"""A law that never moves a weight."""


class MetaController(Modulator):
    """Applies a learned adaptation strategy: acts at every look-ahead and, without any, at every epoch's end.

    Args:
        law: its parameters; None takes those that come with the package.

    Example:
        >>> from adaptive_loss import LossExecutor, MetaController
        >>> executor = LossExecutor({"ce": 1.0, "mix": 1.0}, base="ce", modulators=[MetaController()],
        ...                         probe=lambda: torch.ones((), requires_grad=True))
        >>> executor.weights
        {'ce': 1.0, 'mix': 1.0}
    """

    def __init__(self, law: ControllerLaw | None = None) -> None:
        self.law = ControllerLaw.load(POLICIES / "controller.json") if law is None else law
        self.schedule = Schedule(early_steps=_CLIMBS_IN) if self.law.climbs else Schedule()

    @classmethod
    def from_policy(cls, folder: str | Path | None) -> MetaController:
        """The controller of a policy folder; None is the package's own."""
        return cls(ControllerLaw.load(Path(folder or POLICIES) / "controller.json"))

    def bind(self, terms: Terms, total_steps: int | None, seed: int) -> None:
        """Start at the start weights."""
        super().bind(terms, total_steps, seed)
        self.last_action = 0
        self.told_of_epochs = False
        self.met = torch.zeros(len(terms.names), dtype=torch.bool)

    def after_step(self, context: Context) -> list[Event]:
        """Act on a new look-ahead; without a probe, every 200 steps unless epochs are told."""
        outlook = self.outlook(context)
        return [] if outlook is None else self.move(context, outlook, way(self.law, outlook))

    def end_epoch(self, context: Context, metrics: Mapping[str, float]) -> list[Event]:
        """Act at an epoch's end where there is nothing to look ahead to."""
        self.told_of_epochs = True
        outlook = self._outlook(context, looked=False) if _blind(context) else None
        return [] if outlook is None else self.move(context, outlook, way(self.law, outlook))

    def outlook(self, context: Context) -> Outlook | None:
        """What this step's move depends on; None where it is not time for one."""
        since = context.step - self.last_action
        alone = _blind(context) and not self.told_of_epochs and since >= EPOCH_STEPS
        return self._outlook(context, looked=context.looked) if context.looked or alone else None

    def move(self, context: Context, outlook: Outlook, way: Array) -> list[Event]:
        """Go ``way``, [K] nats, and say so."""
        before = outlook.gained
        moved = np.where(outlook.movable, before + way, before).clip(-REACH, REACH)
        self.log_gain, self.last_action = torch.from_numpy(moved), context.step
        change = moved - before
        if not change.any():
            return []
        if outlook.looked and self.law.climbs and context.rescale is not None:
            context.rescale(self._length_ratio(context, torch.from_numpy(change)))
        details = {
            "change": dict(zip(self.terms.names, change.tolist(), strict=True)),
            "trust": dict(zip(self.terms.names, context.signals.trust.tolist(), strict=True)),
        }
        return [Event(context.step, "controller", "look-ahead" if outlook.looked else "epoch", details)]

    def _outlook(self, context: Context, looked: bool) -> Outlook:
        signals, law, nothing = context.signals, self.law, np.zeros(len(self.terms.names))
        first = nothing
        if looked and signals.look_aheads == 1:
            first = first - self._calibration(context)
        if looked:
            first = first - self._welcome(context)
        asks = looked and law.climbs and len(signals.gramians) > 0
        return Outlook(
            looked=looked,
            base=self.terms.base_index,
            gramians=signals.gramians if asks else None,
            first=first,
            weights=context.weights.numpy(),
            gained=self.log_gain.numpy(),
            movable=self.terms.movable.numpy() & context.on.numpy(),
            trust=signals.trust.numpy() if looked and not asks else nothing,
            share=signals.share.numpy() if looked and not asks else nothing,
            gain=nothing + law.gain + _along(law.trust, context),
            linear=nothing + self._linear(context),
            step=self._by_age(context, "step"),
            band=self._by_age(context, "band"),
        )

    def _linear(self, context: Context) -> Array | float:
        law, progress = self.law, min(1.0, context.signals.progress or 0.0)
        drift = _along(law.drift, context)
        if not any((*law.features, *law.late_features)):  # then they need not be made
            return drift
        terms = context.signals.term_features(context.weights, context.weights, context.start)
        return (terms @ (_vector(law.features) + progress * _vector(law.late_features)) + drift).numpy()

    def _by_age(self, context: Context, what: Literal["step", "band"]) -> Array:
        """[K] the early one for terms that have been there no longer than the early look-aheads take, else the late."""
        # The clock has moved on since the look-ahead of the step before.
        is_early = context.step - 1 - context.signals.arrivals.numpy() <= self.schedule.edge(self.total_steps)
        early, late = (getattr(self.law, f"{age}_{what}") for age in ("early", "late"))
        return np.where(is_early, early, late)

    def _length_ratio(self, context: Context, change: Tensor) -> float:
        """By how much the move makes the whole gradient longer; without a base the weights keep their sum."""
        before, after = context.weights, context.weights * change.exp()
        if self.terms.base is None:
            after = after * (before.sum() / after.sum())
        return length_ratio(context.signals.gramians[-1], before, after)

    def _welcome(self, context: Context) -> Array | float:
        """[K] nats by which a gradient is longer than the base's: of a term that came in mid-run, at its first look."""
        new = context.present.numpy() & ~self.met.numpy()
        if not new.any():
            return 0.0
        self.met = self.met | context.present
        late = new & (context.signals.arrivals > 0).numpy()
        return np.where(late & self.law.climbs, self._excess(context).clip(0), 0.0)

    def _calibration(self, context: Context) -> Array:
        return self.law.calibration * self._excess(context)

    def _excess(self, context: Context) -> Array:
        """[K] log(shareᵢ/share_base), the base being the mean term where none is declared."""
        share = context.signals.share.clamp_min(1e-12).log()
        base = self.terms.base_index
        return (share - (share[context.on].mean() if base is None else share[base])).numpy()

    def state_dict(self) -> dict[str, Any]:
        """Gains, the clock of actions, and which terms were met; the law itself is a setting, not state."""
        clock = {"last_action": self.last_action, "told_of_epochs": self.told_of_epochs, "met": self.met.clone()}
        return super().state_dict() | clock

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        super().load_state_dict(state)
        self.last_action, self.told_of_epochs = state["last_action"], state["told_of_epochs"]
        self.met = state["met"].clone()


@dataclass(frozen=True)
class Outlook:
    """What one move of a controller depends on; all arrays [K], or [N, K] of N runs that move as one.

    Args:
        looked: whether there is a look-ahead behind it.
        base: index of the base term, or None.
        gramians: [M, K+1, K+1] the remembered look-aheads, where the law asks them anew.
        first: nats that are gone before any urge is asked for.
        weights, gained: applied weights, and log-gains so far.
        movable: bool, the terms that may move now.
        trust, share: of the look-aheads, where they are not asked anew; 0 without any.
        gain: what a trust counts for.
        linear: what the features add.
        step, band: δ and τ, by the term's age.
    """

    looked: bool
    base: int | None
    gramians: Tensor | None
    first: Array
    weights: Array
    gained: Array
    movable: NDArray[np.bool_]
    trust: Array
    share: Array
    gain: Array
    linear: Array
    step: Array
    band: Array

    @staticmethod
    def stacked(outlooks: Sequence[Outlook]) -> Outlook:
        """One of N runs under one law with equally many look-aheads."""
        one = outlooks[0]
        parts: dict[str, Any] = {
            name: np.stack([getattr(outlook, name) for outlook in outlooks]) if isinstance(value, np.ndarray) else value
            for name, value in vars(one).items()
        }
        if one.gramians is not None:
            parts["gramians"] = torch.stack([outlook.gramians for outlook in outlooks])  # pyright: ignore[reportArgumentType]
        return Outlook(**parts)


def way(law: ControllerLaw, outlook: Outlook) -> Array:
    """[K] or [N, K] nats that a law moves the log-weights by."""
    gone, push = outlook.first, _Push(law, outlook)
    for _ in range(push.rounds):
        gone = gone.clip(-REACH, REACH)
        part = push.after(gone)
        if not part.any():  # asked again, it would say the same
            break
        gone = gone + part
    return gone


class _Push:
    """δ·b(xᵢ) of the law, part by part; what is the same for every part is made once, as calls are what costs.

    b(x) = clip((x − clip(x, −τ, τ))/(1 − τ), −1, 1), with a limit of 0 instead for a term that may not rise, or move.
    """

    def __init__(self, law: ControllerLaw, outlook: Outlook) -> None:
        self.law, self.outlook = law, outlook
        self.rounds = _ROUNDS if law.climbs else 1
        self.recall = None if outlook.gramians is None else Recall(outlook.gramians)
        self.step, self.least = outlook.step / self.rounds, -1.0 * outlook.movable
        self.low_band, self.beyond_band = -outlook.band, 1 - outlook.band
        self.to_start = -outlook.gained

    def after(self, gone: Array) -> Array:
        """[K] or [N, K] the next part, where ``gone`` nats of this move are behind."""
        law, outlook = self.law, self.outlook
        base, may_rise = outlook.base, outlook.movable
        trust, share = self._evidence(gone)
        if base is not None:
            outgrown = share > share[..., base, None]
            trust = trust - law.against_base * trust[..., base, None] * outgrown
            may_rise = may_rise & ~(outgrown & (gone >= self.to_start)) if law.climbs else may_rise
        urge = trust * outlook.gain + outlook.linear
        beyond = (urge - urge.clip(self.low_band, outlook.band)) / self.beyond_band
        return self.step * beyond.clip(self.least, may_rise)

    def _evidence(self, gone: Array) -> tuple[Array, Array]:
        if self.recall is None:
            return self.outlook.trust, self.outlook.share
        return self.recall.at(self.outlook.weights * np.exp(gone))


def _blind(context: Context) -> bool:
    """Whether there is no probe, or none of its look-aheads has come: its graph is lost, or it is never finite."""
    return context.objective is None or context.signals.look_aheads == 0


def _along(drift: tuple[float, ...], context: Context) -> float:
    """⟨drift, π⟩, π being the features of progress, which need not be made for a drift of 0."""
    return float(context.signals.global_features()[_PROGRESS] @ _vector(drift)) if any(drift) else 0.0


def _vector(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
