"""Torture of data parallel training: ``python -m tests.reliability.parallel`` prints its rows of the table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from adaptive_loss.weighting import TORCHJD, weightings
from tests.reliability.parallel_faults import KINDS, wrong
from tests.reliability.ranks import launch
from tests.reliability.rows import Row

SIZES = (2, 4)
SYSTEMS = ("fixed", "dwa", "gradnorm", "uncertainty", "relobralo")
CHUNK = 20
"""Trials a launch: what hangs takes no more with it."""
NEAR = 1e-10
LIMIT = 1200.0
"""Seconds a launch may take on a busy machine."""
SWITCHES = ("switch_on × gradnorm", "wind_down by cosines")
BY_TOLERANCE = ("nash_mtl",)
"""Its solver stops at a tolerance, which makes more of the rounding in what it is given."""


def gradient_rules() -> list[str]:
    """The rules that take gradients."""
    return [*(n for n in weightings.names() if "gradients" in weightings.get(n)(3).needs), *TORCHJD, *SWITCHES]


def cases(wrap: str) -> list[tuple[str, str]]:
    """Every rule at features and, where parameters are whole and it takes gradients, at them."""
    taps = ("features", "parameter", "both") if wrap == "ddp" else ("features",)
    others = [(name, "features") for name in weightings.names() if name not in gradient_rules()]
    return others + [(name, tap) for name in gradient_rules() for tap in taps]


def apart(name: str, ranks: Sequence[Mapping[str, Any]]) -> str | None:
    """What a comparison with one process found wrong, from what each rank tells of it; None if nothing."""
    first = ranks[0]
    if "refused" in first:
        return f"{name}: {first['refused']}"
    if any(told["digest"] != first["digest"] or told.get("state") != first.get("state") for told in ranks):
        return f"{name}: the ranks' weights, parameters or states differ"
    near = distance(first) <= NEAR or name.partition(" at ")[0] in BY_TOLERANCE
    return None if near else f"{name}: {distance(first):.1e} from one process"


def distance(told: Mapping[str, Any]) -> float:
    """Of a run from the same in one process: weights relative to their size above 1, parameters absolute."""
    return max(told.get("weights", 0.0), told.get("parameters", 0.0))


Run = tuple[str, list[Mapping[str, Any]]]
"""A run's name, and what each rank tells of it."""


def torture(steps: int = 1000, short: int = 40, trials: int = 200) -> list[Row]:
    """All ranks find one set of weights, that of one process, and decide alike whatever goes wrong on one of them.

    Args:
        steps: of controller, monitor and probe over each of :data:`SYSTEMS`, with each number of ranks.
        short: steps of every rule.
        trials: faults.
    """
    return [_compared([*systems(steps), *every_rule(short)], steps, short), _decided(list(faults(trials)))]


def _compared(runs: Sequence[Run], steps: int, short: int) -> Row:
    far = max(distance(ranks[0]) for name, ranks in runs if name.partition(" at ")[0] not in BY_TOLERANCE)
    note = f"{steps} steps of {len(SYSTEMS)} systems, {short} of every rule, on {SIZES} ranks; furthest {far:.1e}"
    broken = _told([apart(name, ranks) for name, ranks in runs])
    return Row(f"data parallel: bit-equal weights on all ranks, ≤ {NEAR:g} from one process", len(runs), broken, note)


def _decided(found: Sequence[str | None]) -> Row:
    note = f"{', '.join(KINDS)}; on {SIZES} ranks"
    return Row("data parallel: a fault on one rank is one decision, no hang", len(found), _told(found), note)


def _told(found: Sequence[str | None]) -> int:
    """How many are broken; each is printed."""
    broken = [line for line in found if line is not None]
    print(*broken, sep="\n")
    return len(broken)


def systems(steps: int) -> Iterator[Run]:
    """Controller, monitor and probe over several rules."""
    for size in SIZES:
        for rule in SYSTEMS:
            yield from _runs("tests.reliability.parallel_system:system", size, rules=[rule], steps=steps)


def every_rule(steps: int) -> Iterator[Run]:
    """Under DDP and under ``fully_shard``."""
    for size in SIZES:
        for wrap in ("ddp", "fsdp"):
            yield from _runs("tests.reliability.parallel_jobs:rules", size, cases=cases(wrap), steps=steps, wrap=wrap)


def _runs(job: str, size: int, **arguments: Any) -> Iterator[Run]:
    try:
        ranks = launch(job, size, LIMIT, **arguments)
    except RuntimeError as error:  # a hang is one
        yield job, [{"refused": str(error)}]
        return
    yield from ((name, [told[name] for told in ranks]) for name in ranks[0])


def faults(trials: int) -> Iterator[str | None]:
    """What each trial did wrong: half with each number of ranks, a quarter under ``fully_shard``."""
    for number, start in enumerate(range(0, trials, CHUNK)):
        numbers = list(range(start, min(start + CHUNK, trials)))
        size, wrap = SIZES[number % 2], "fsdp" if number % 4 == 3 else "ddp"
        try:
            ranks = launch("tests.reliability.parallel_faults:faults", size, LIMIT, trials=numbers, wrap=wrap)
        except RuntimeError as error:
            yield from [f"trials {numbers}: {error}"] * len(numbers)
        else:
            yield from (wrong(told) for told in zip(*ranks, strict=True))


if __name__ == "__main__":
    print(*torture(), sep="\n")
