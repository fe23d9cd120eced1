"""One line of the reliability table."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """What a torture test found.

    Args:
        promise: what is promised.
        trials: how often it was tried.
        failures: how often it was broken.
        note: the numbers measured.
    """

    promise: str
    trials: int
    failures: int
    note: str = ""
