"""Which small training runs something is trained on or judged by: families, draws and seeds, never the same twice."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from adaptive_loss.errors import UsageError
from adaptive_loss.meta.families import families
from adaptive_loss.meta.fleet import trained_families
from adaptive_loss.trainer.simple_ablation_analysis import bca_interval

HELD_OUT_SEEDS = 1_000_000
"""Problems that judge have seeds from here on, which no training reaches."""
VALIDATION_SEEDS = 900_000
"""Problems that training watches itself by have seeds from here on."""


@dataclass(frozen=True)
class Problem:
    """A fleet to be: runs of one family.

    Args:
        family: its name.
        draw: the seed of what its runs share.
        seeds: one a run.
    """

    family: str
    draw: int
    seeds: tuple[int, ...]


def draw_problems(names: Sequence[str], runs: int, first_seed: int, draws: int = 1) -> list[Problem]:
    """``draws`` fleets of ``runs`` runs a family, all seeds from ``first_seed`` on."""
    starts = [first_seed + runs * draw for draw in range(draws)]
    return [Problem(name, start, tuple(range(start, start + runs))) for start in starts for name in names]


def chosen_families(wanted: Sequence[str], without: Sequence[str]) -> list[str]:
    """The families to train on: those wanted (none: all), less those left out.

    Raises:
        UsageError: a name is unknown, or nothing is left.
    """
    for flag, names in (("--families", wanted), ("--without", without)):
        for name in names:
            families.resolve(name, flag=flag)
    left = [name for name in (wanted or trained_families()) if name not in without]
    if not left:
        raise UsageError("--without leaves no family; name fewer")
    return left


def summarised(groups: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
    """For ``all`` and for each group: how many, their mean and its 95% BCa bootstrap interval."""
    together = {"all": [value for values in groups.values() for value in values], **groups}
    return {
        name: {"n": len(values), "mean": statistics.fmean(values), "interval95": bca_interval(values)}
        for name, values in together.items()
    }
