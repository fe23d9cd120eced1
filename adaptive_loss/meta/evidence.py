"""``adaptive-loss evidence``: what a policy's monitor wins over its controller alone, on runs that nothing has seen.

Each held-out run is trained three times with the same data, initialisation, batches and start weights, under the
controller alone and under the controller with the monitor; what is compared is the log of the final judged loss. Beside
the monitor stand a random one, and the monitor with its observations shuffled, which would win as much if watching did
not matter. ``--write`` sets ρ on the policy's card: 1 where the whole 95% interval of the gain over all families lies
above 0 and no family's allows for harm of 5%, else 0. Look once: the held-out runs are the same every time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaptive_loss.errors import UsageError
from adaptive_loss.meta.fleet import STEPS
from adaptive_loss.meta.problems import HELD_OUT_SEEDS, Problem, chosen_families, command_of, draw_problems, summarised
from adaptive_loss.meta.rollouts import Network, law_beside, rollout
from adaptive_loss.meta_controller import ControllerLaw
from adaptive_loss.policy_files import POLICIES, TOLD, read_policy, write_policy
from adaptive_loss.records import json_dump, provenance, write_atomic
from adaptive_loss.utils.commands import command, command_line, parse
from adaptive_loss.utils.config import core_count

PROG = "adaptive-loss evidence"
ARMS = {"monitor": "greedy", "shuffled": "shuffled", "random": "random"}
"""Arm → behaviour on top of the controller; each is paired with the controller alone."""
HARM = 0.05
"""Harm, in log J, that no family's interval may allow for."""
LEAST = ("runs", "draws", "steps")


@dataclass(frozen=True, kw_only=True)
class Flags:
    """The flags of the evidence."""

    policy: Path = POLICIES
    """Folder with the monitor and the controller to judge; the package's own where none is given."""
    families: tuple[str, ...] = ()
    """Families to judge on, file names in adaptive_loss/meta/families; those that may be trained on by default."""
    runs: int = 16
    """Held-out runs of each family and draw."""
    draws: int = 2
    """Draws of architecture and optimizer a family."""
    steps: int = STEPS
    """Length of the runs in optimizer steps."""
    write: bool = False
    """Set ρ on the card by what was found, and add the evidence to it."""
    output_dir: Path = Path("results/evidence")
    """Where evidence.json goes."""
    jobs: int = 0
    """Processes; 0 is one a core."""


def measure(flags: Flags, network: Network, law: ControllerLaw) -> dict[str, dict[str, Any]]:
    """Arm → family (or ``all``) → number of runs, mean gain in log J over the controller alone, interval."""
    from joblib import Parallel, delayed

    names = chosen_families(flags.families)
    problems = draw_problems(names, flags.runs, HELD_OUT_SEEDS, flags.draws)
    todo = [(arm, problem) for arm in ARMS for problem in problems]
    calls = (delayed(_gains)(problem, ARMS[arm], network, law, flags.steps) for arm, problem in todo)
    found = Parallel(n_jobs=flags.jobs or core_count())(calls)
    groups: dict[str, dict[str, list[float]]] = {arm: {} for arm in ARMS}
    for (arm, problem), gains in zip(todo, found, strict=True):  # pyright: ignore[reportArgumentType]
        groups[arm].setdefault(problem.family, []).extend(gains)  # pyright: ignore[reportArgumentType]
    return {arm: summarised(families) for arm, families in groups.items()}


def _gains(problem: Problem, behaviour: str, network: Network, law: ControllerLaw, steps: int) -> list[float]:
    return rollout(problem, (behaviour,), network, law, steps).gains.tolist()


def earned(evidence: dict[str, dict[str, Any]]) -> float:
    """ρ: 1 where the whole interval of the monitor's gain lies above 0 and no family's allows for harm of 5%, else 0.

    Example:
        >>> earned({"monitor": {"all": {"interval95": [0.01, 0.02]}, "vae": {"interval95": [-0.01, 0.05]}}})
        1.0
    """
    intervals = [entry["interval95"] for entry in evidence["monitor"].values()]
    if any(ends is None or ends[0] < -HARM for ends in intervals):
        return 0.0
    return 1.0 if evidence["monitor"]["all"]["interval95"][0] > 0 else 0.0


def table(evidence: dict[str, dict[str, Any]]) -> str:
    """A line an arm and family."""
    lines = [f"{'arm':<10}{'family':<16}{'runs':>6}   gain over the controller alone, log J"]
    for arm, families in evidence.items():
        for family, entry in families.items():
            low, high = entry["interval95"] or (math.nan, math.nan)
            lines.append(f"{arm:<10}{family:<16}{entry['n']:>6}   {entry['mean']:+.4f} [{low:+.4f}, {high:+.4f}]")
    return "\n".join(lines)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    flags = parse(Flags, argv, PROG, "What a policy's monitor wins over its controller alone, on held-out runs.")
    for name, least in (("runs", 2), ("draws", 1), ("steps", 40), ("jobs", 0)):
        if getattr(flags, name) < least:
            raise UsageError(f"--{name} is {getattr(flags, name)}; give at least {least}")
    defaults = Flags()
    if flags.write and (flags.families or any(getattr(flags, n) < getattr(defaults, n) for n in LEAST)):
        raise UsageError("--write judges by all families and no fewer runs, draws and steps than the defaults")
    card, network, law = _policy(flags.policy)
    evidence = measure(flags, network, law)
    rho, told = earned(evidence), command_line(PROG, argv)
    document = {"evidence": evidence, "rho": rho, "policy": card.get("sha256"), "provenance": provenance(told)}
    write_atomic(flags.output_dir / "evidence.json", json_dump(document))
    if flags.write:
        asked = {"runs": flags.runs, "draws": flags.draws, "steps": flags.steps}
        found = {"command": command_of(PROG, asked), **evidence}
        trained_with = {"trained_with": card.get("trained_with", card.get("versions"))}
        write_policy(flags.policy, "monitor", network, {**card, **trained_with, "rho": rho, "evidence": found})
    print(table(evidence))
    print(f"rho by this evidence: {rho:g}" + (f", written to {flags.policy / 'monitor.json'}" if flags.write else ""))
    return 0


def _policy(folder: Path) -> tuple[dict[str, Any], Network, ControllerLaw]:
    try:
        card, network = read_policy(folder, "monitor")
    except ValueError as error:
        raise UsageError(str(error)) from error
    missing = [entry for entry in TOLD if entry not in card]
    if missing:
        raise UsageError(f"{folder / 'monitor.json'} says nothing of {missing[0]!r}: it is no whole card")
    if not network:
        raise UsageError(
            f"{folder / 'monitor.json'} has no trained networks: make some with adaptive-loss pretrain monitor"
        )
    return card, network, law_beside(folder)
