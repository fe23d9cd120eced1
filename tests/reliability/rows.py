"""What the torture of one promise found."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One line of the torture's table.

    Args:
        promise: what was put to the test.
        trials: how often.
        failures: how often it did not hold.
        note: what a reader should know besides.
    """

    promise: str
    trials: int
    failures: int
    note: str = ""
