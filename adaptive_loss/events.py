"""Events: what was done to the weights, when and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Event:
    """One intervention: when, what, why, and its details (before → after).

    ``kind`` is one of skip, clamp, controller, action, gate, switch, alarm, quarantine, rollback.
    """

    step: int
    kind: str
    reason: str
    details: Mapping[str, Any] = field(default_factory=dict)
