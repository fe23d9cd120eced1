"""What a torture module gives back."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One line of the table: what is promised, how often it was tried, how often it failed."""

    promise: str
    trials: int
    failures: int
    note: str = ""
