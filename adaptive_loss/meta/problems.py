"""Which small training runs something is trained on or judged by: families, draws and seeds, never the same twice."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adaptive_loss.errors import UsageError
from adaptive_loss.meta.families import families
from adaptive_loss.meta.fleet import trained_families
from adaptive_loss.trainer.simple_ablation_analysis import bca_interval

HELD_OUT_SEEDS = 3_000_000
"""Problems that judge have seeds from here on, which no training reaches. Raise it once they have judged often."""
VALIDATION_SEEDS = 900_000
"""Problems that training watches itself by have seeds from here on, and those it learns from lie below."""


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


def chosen_families(wanted: Sequence[str], without: Sequence[str] = ()) -> list[str]:
    """The families wanted, each once (none: all that may be trained on), less those left out.

    Raises:
        UsageError: a name is unknown, or nothing is left.
    """
    named, out = ([families.resolve(n, flag=f) for n in v] for f, v in (("--families", wanted), ("--without", without)))
    left = [name for name in dict.fromkeys(named or trained_families()) if name not in out]
    if not left:
        raise UsageError("--without leaves no family; name fewer")
    return left


def families_to_train_on(wanted: Sequence[str], without: Sequence[str]) -> list[str]:
    """:func:`chosen_families`, none of which is kept apart to judge by.

    Raises:
        UsageError: one is.
    """
    names = chosen_families(wanted, without)
    for name in names:
        if families.get(name).is_held_apart:
            raise UsageError(
                f"--families: {name} is kept apart to judge by, and nothing is trained on it; leave it out"
            )
    return names


def command_of(prog: str, settings: Mapping[str, Any]) -> str:
    """The command that has these settings, those that are empty left out.

    Example:
        >>> command_of("adaptive-loss pretrain monitor", {"seed": 0, "without": ["vae", "gan"], "forks": False})
        'adaptive-loss pretrain monitor --seed 0 --without vae gan --no-forks'
    """
    return " ".join([prog, *(words for name, value in settings.items() if (words := _flag(name, value)))])


def _flag(name: str, value: Any) -> str:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    values = value if isinstance(value, (list, tuple)) else [value]
    return " ".join([f"--{flag}", *map(str, values)]) if values else ""


def summarised(groups: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
    """For ``all`` and for each group: how many, their mean and its 95% BCa bootstrap interval."""
    together = {"all": [value for values in groups.values() for value in values], **groups}
    return {
        name: {"n": len(values), "mean": statistics.fmean(values), "interval95": bca_interval(values)}
        for name, values in together.items()
    }
