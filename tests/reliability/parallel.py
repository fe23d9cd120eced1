"""Torture of data parallel training: ``python -m tests.reliability.parallel`` prints its row of the table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from adaptive_loss.weighting import TORCHJD, weightings
from tests.reliability.parallel_faults import wrong
from tests.reliability.ranks import launch
from tests.reliability.rows import Row

SIZES = (2, 4)
STEPS, SHORT = 1000, 100
SYSTEMS = ("fixed", "dwa", "gradnorm", "uncertainty", "relobralo")
TRIALS, CHUNK = 200, 20
NEAR = 1e-10
LIMIT = 1800.0
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


def torture() -> Row:
    """All ranks find one set of weights, that of one process, and decide alike whatever goes wrong on one of them."""
    runs = [*systems(), *every_rule()]
    found = [*(apart(name, ranks) for name, ranks in runs), *faults()]
    broken = [line for line in found if line is not None]
    print(*broken, sep="\n")
    far = max(distance(ranks[0]) for name, ranks in runs if name.partition(" at ")[0] not in BY_TOLERANCE)
    return Row(
        "data parallel: weights bit-equal on all ranks, ≤ 1e-10 from one process; one decision",
        len(found),
        len(broken),
        f"{STEPS} steps of {len(SYSTEMS)} systems, {SHORT} of every rule, {TRIALS} faults; furthest {far:.1e}",
    )


Run = tuple[str, list[Mapping[str, Any]]]
"""A run's name, and what each rank tells of it."""


def systems() -> Iterator[Run]:
    """Controller, monitor and probe over several rules."""
    for size in SIZES:
        for rule in SYSTEMS:
            yield from _runs("tests.reliability.parallel_system:system", size, rules=[rule], steps=STEPS)


def every_rule() -> Iterator[Run]:
    """Under DDP and under ``fully_shard``."""
    for size in SIZES:
        for wrap in ("ddp", "fsdp"):
            yield from _runs("tests.reliability.parallel_jobs:rules", size, cases=cases(wrap), steps=SHORT, wrap=wrap)


def _runs(job: str, size: int, **arguments: Any) -> Iterator[Run]:
    try:
        ranks = launch(job, size, LIMIT, **arguments)
    except RuntimeError as error:  # a hang is one
        yield job, [{"refused": str(error)}]
        return
    yield from ((name, [told[name] for told in ranks]) for name in ranks[0])


def faults() -> Iterator[str | None]:
    """What each trial did wrong: half with each number of ranks, a quarter under ``fully_shard``."""
    for start in range(0, TRIALS, CHUNK):
        number, trials = start // CHUNK, list(range(start, start + CHUNK))
        size, wrap = SIZES[number % 2], "fsdp" if number % 4 == 3 else "ddp"
        try:
            ranks = launch("tests.reliability.parallel_faults:faults", size, LIMIT, trials=trials, wrap=wrap)
        except RuntimeError as error:
            yield from [f"trials {start} to {start + CHUNK - 1}: {error}"] * CHUNK
        else:
            yield from (wrong(told) for told in zip(*ranks, strict=True))


if __name__ == "__main__":
    print(torture())
