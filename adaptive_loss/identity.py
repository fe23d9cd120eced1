"""Identity: what a saved state must share with the executor that loads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from adaptive_loss.losses import Terms
from adaptive_loss.modulator import Modulator
from adaptive_loss.weighting.base import Weighting


def identity(terms: Terms, weighting: Weighting, modulators: Sequence[Modulator]) -> dict[str, str]:
    """What makes an executor the one it is, in words: what it is made of, not what it has learned."""
    return {
        "terms": ", ".join(terms.names),
        "base": str(terms.base),
        "start weights": ", ".join(f"{weight:g}" for weight in terms.start.values()),
        "targets": ", ".join(terms.targets),
        "pinned": ", ".join(sorted(terms.pinned)),
        "reductions": ", ".join(f"{name} × {r.factor:g}" for name, r in terms.reductions.items()),
        "weighting": weighting.name,
        "modulators": ", ".join(modulator.identity for modulator in modulators),
    }


def check_identity(saved: Mapping[str, str], own: Mapping[str, str]) -> None:
    """Refuse another kind of executor's state.

    Raises:
        ValueError: they differ; the first difference is named.
    """
    for what, value in own.items():
        if saved[what] != value:
            raise ValueError(f"this state belongs to another executor: its {what} are {saved[what]!r}, here {value!r}")
