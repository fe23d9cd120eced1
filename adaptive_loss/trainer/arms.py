"""The arms of a study: what is run under a name in its results, and from which start weights."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from adaptive_loss.errors import UsageError
from adaptive_loss.modes import modes
from adaptive_loss.utils.config import Settings

# A study's name for a mode, where the run itself is another mode: `tuned` and `customary` are the baseline with weights
# that a search found, or that the task says are usual.
RUN_AS = {"tuned": "baseline", "customary": "baseline"}
OWN_START = ("tuned", "customary")
REPLAYS = {"replay_mean": "fixed", "replay_schedule": "replay"}
"""An arm that replays the weights of another's finished run → the rule by which it does."""
GIVEN = "given"
_FACTOR = re.compile(r"(?P<term>\w+)(?P<operation>[*/])(?P<number>[0-9.eE+-]+)")


@dataclass(frozen=True)
class Arm:
    """One arm of a study.

    Args:
        name: in the results and of its folder.
        mode: what adapts the weights.
        weighting: the rule below it; None is the study's own.
        start: its start weights: ``given``, ``customary`` or ``tuned``.
        factor: a term and what its start weight is multiplied by, to start from a wrong one.
        source: the arm whose finished run of the same seed it replays.
    """

    name: str
    mode: str = "baseline"
    weighting: str | None = None
    start: str = GIVEN
    factor: tuple[str, float] | None = None
    source: str | None = None

    def weights(self, settings: Settings, tuned: Mapping[str, float] | None = None) -> dict[str, float]:
        """The start weights of its runs, as far as they are not 1; ``tuned`` is what a search found."""
        if self.start == "tuned" and tuned is not None:
            return dict(tuned)
        if self.start != "customary" and self.factor is None:
            return dict(settings.weights)
        from adaptive_loss.tasks import tasks

        customary = dict(tasks.get(settings.task).customary)
        if self.factor is None:
            return customary
        term, factor = self.factor
        weights = {**customary, **settings.weights}
        return {**weights, term: weights.get(term, 1.0) * factor}

    def replayed(self, start: Mapping[str, float], export: Mapping[str, Any]) -> dict[str, Any]:
        """The settings that replay what ``LossExecutor.export`` says of a run from ``start``."""
        if self.weighting == "replay":
            return {"weights": dict(start), "schedule": export["schedule"]}
        return {"weights": {**start, **export["mean"]}}


def mode_name(given: str, flag: str) -> str:
    """A mode's own name, behind an alias or hyphens too; :class:`UsageError` names ``flag`` and the choices."""
    return modes.resolve(given, flag=flag, also=RUN_AS)


def mode_arm(name: str) -> Arm:
    """The arm of a mode, by its own name or one that only studies have."""
    return Arm(name, RUN_AS.get(name, name), start=name if name in OWN_START else GIVEN)


def rule_arm(given: str, flag: str) -> Arm:
    """The arm behind the name of a mode, or of a weighting rule on weights that nothing else moves.

    Raises:
        UsageError: it is neither; ``flag`` and the choices are named.

    Example:
        >>> rule_arm("full_adaptive", "--weightings").mode, rule_arm("gradnorm", "--weightings").weighting
        ('full', 'gradnorm')
    """
    from adaptive_loss.weighting import weightings

    names, name = {*modes.names(), *modes.aliases, *RUN_AS}, given.replace("-", "_")
    if name in names:
        return mode_arm(mode_name(given, flag))
    if name in REPLAYS:
        return Arm(name, weighting=REPLAYS[name])
    return Arm(name, weighting=weightings.resolve(given, flag=flag, also=names | {*REPLAYS}))


def sourced(arms: Sequence[Arm], flag: str) -> list[Arm]:
    """``arms``, each replay with the arm that it replays: of those that adapt, the last one named before it.

    Raises:
        UsageError: there is none.

    Example:
        >>> [arm.source for arm in sourced([Arm("full", "full"), Arm("replay_mean")], "--weightings")]
        [None, 'full']
    """
    found, last = [], None
    for arm in arms:
        if arm.name in REPLAYS and last is None:
            raise UsageError(f"{flag}: {arm.name} replays a mode that adapts; name one before it, controller_only say")
        last = arm.name if modes.get(arm.mode)().adapts else last
        found.append(replace(arm, source=last) if arm.name in REPLAYS else arm)
    return found


def started(arm: Arm, start: str) -> Arm:
    """``arm`` from another start: ``given``, ``customary``, ``term*10`` or ``term/10``.

    Raises:
        UsageError: that is no start.

    Example:
        >>> started(Arm("fixed"), "kl/10")
        Arm(name='fixed/kl_x0.1', mode='baseline', weighting=None, start='given', factor=('kl', 0.1))
    """
    if arm.start in OWN_START or start == GIVEN:
        return arm
    if start == "customary":
        return _elsewhere(arm, start, start=start)
    match = _FACTOR.fullmatch(start)
    factor = _number(match["number"]) if match else 0.0
    if match is None or not 0 < factor < float("inf"):
        raise UsageError(f"--starts: {start!r} is no start; give given, customary, TERM*10 or TERM/10")
    factor = factor if match["operation"] == "*" else 1 / factor
    place = f"{match['term']}_x{factor:g}".replace("+", "")
    return _elsewhere(arm, place, factor=(match["term"], factor))


def _elsewhere(arm: Arm, place: str, **changes: Any) -> Arm:
    """``arm`` under the name of its start; what it replays starts there too."""
    source = None if arm.source is None else f"{arm.source}/{place}"
    return replace(arm, name=f"{arm.name}/{place}", source=source, **changes)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0
