"""``adaptive-loss evidence``: what a policy's monitor wins over its controller alone, on runs that nothing has seen.

Each held-out run is trained with the same data, initialisation, batches and start weights under the controller alone
and under the controller with the monitor; what is compared is the log of the final judged loss. Beside the monitor
stand one that is bold (no lower bound), one that is shown what another run sees, which would win as much if watching
did not matter, and a random one. ``--rivals`` trains the same runs in other ways too, tuned fixed weights among them,
and says how much of what the wrong start weights cost each way wins back. ``--write`` sets ρ on the policy's card: 1
where the whole 95% interval of the gain over all families lies above 0, no family's allows for harm of 5%, and no study
of real training named with ``--studies`` shows for sure that the monitor raised the test loss; else 0. Look once: the
held-out runs are the same every time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaptive_loss.errors import UsageError
from adaptive_loss.meta.fleet import STEPS
from adaptive_loss.meta.problems import HELD_OUT_SEEDS, Problem, chosen_families, command_of, draw_problems, summarised
from adaptive_loss.meta.rivals import RIVALS, one_thread_finals, overall, recovered
from adaptive_loss.meta.rollouts import Network, law_beside, rollout
from adaptive_loss.meta_controller import ControllerLaw
from adaptive_loss.policy_files import POLICIES, TOLD, read_policy, write_policy
from adaptive_loss.records import json_dump, provenance, write_atomic
from adaptive_loss.trainer.simple_ablation_analysis import ResultsError, find_results, paired, read_rows
from adaptive_loss.utils.commands import command, command_line, parse
from adaptive_loss.utils.config import core_count

PROG = "adaptive-loss evidence"
ARMS = {"monitor": "greedy", "bold": "bold", "shuffled": "shuffled", "random": "random"}
"""Arm → behaviour on top of the controller; each is paired with the controller alone."""
HARM = 0.05
"""Harm, in log J, that no family's interval may allow for."""
LEAST = ("runs", "draws", "steps")

Workers = Callable[[Iterable[Any]], Any]
ByFamily = dict[str, dict[str, list[float]]]


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
    rivals: bool = False
    """Train the held-out runs in other ways too, and tell what part of the gap to tuned weights each recovers."""
    studies: tuple[Path, ...] = ()
    """Folders of ``adaptive-loss ablate`` with the modes full and controller_only under this very policy."""
    write: bool = False
    """Set ρ on the card by what was found, and add the evidence to it."""
    output_dir: Path = Path("results/evidence")
    """Where evidence.json goes."""
    jobs: int = 0
    """Processes; 0 is one a core."""


def measure(flags: Flags, network: Network, law: ControllerLaw) -> dict[str, dict[str, Any]]:
    """Arm → family (or ``all``) → number of runs, mean gain in log J over the controller alone, interval.

    With ``--rivals`` also ``recovered`` → arm → family (or ``all``) → what :func:`~adaptive_loss.meta.rivals.recovered`
    and :func:`~adaptive_loss.meta.rivals.overall` say.
    """
    from joblib import Parallel

    problems = draw_problems(chosen_families(flags.families), flags.runs, HELD_OUT_SEEDS, flags.draws)
    workers = Parallel(n_jobs=flags.jobs or core_count())
    gains, finals = _with_monitors(workers, problems, network, law, flags.steps)
    found = {arm: summarised(families) for arm, families in gains.items()}
    if not flags.rivals:
        return found
    _add_rivals(workers, problems, flags.steps, finals)
    return {**found, "recovered": _recovered(finals)}


def _with_monitors(
    workers: Workers, problems: Sequence[Problem], network: Network, law: ControllerLaw, steps: int
) -> tuple[ByFamily, ByFamily]:
    """Arm → family → gain a run, and family → arm → log J a run, ``full`` and ``controller_only`` among them."""
    from joblib import delayed

    todo = [(arm, problem) for arm in ARMS for problem in problems]
    played = workers(delayed(_played)(problem, ARMS[arm], network, law, steps) for arm, problem in todo)
    gains: ByFamily = {arm: {} for arm in ARMS}
    finals: ByFamily = {problem.family: {} for problem in problems}
    for (arm, problem), (won, nudged, never) in zip(todo, played, strict=True):
        gains[arm].setdefault(problem.family, []).extend(won)
        finals[problem.family].setdefault("full" if arm == "monitor" else arm, []).extend(nudged)
        if arm == "monitor":
            finals[problem.family].setdefault("controller_only", []).extend(never)
    return gains, finals


def _add_rivals(workers: Workers, problems: Sequence[Problem], steps: int, finals: ByFamily) -> None:
    """Put every rival's log J a run into ``finals``."""
    from joblib import delayed

    todo = [(name, problem) for name in RIVALS for problem in problems]
    trained = workers(delayed(one_thread_finals)(name, problem, steps) for name, problem in todo)
    for (name, problem), values in zip(todo, trained, strict=True):
        finals[problem.family].setdefault(name, []).extend(values)


def _played(
    problem: Problem, behaviour: str, network: Network, law: ControllerLaw, steps: int
) -> tuple[list[float], list[float], list[float]]:
    found = rollout(problem, (behaviour,), network, law, steps)
    nudged, never = found.finals.tolist()
    return found.gains.tolist(), nudged, never


def _recovered(finals: ByFamily) -> dict[str, dict[str, Any]]:
    by_family = {family: recovered(of_family) for family, of_family in finals.items()}
    arms = next(iter(by_family.values()))
    return {
        arm: {"all": overall(finals, arm), **{family: found[arm] for family, found in by_family.items()}}
        for arm in arms
    }


def studied(folders: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Folder → test loss of ``full`` less that of ``controller_only``, paired by seed, its interval, and failed runs.

    Raises:
        UsageError: a folder holds no results, or no two seeds that finished under both modes.
    """
    return {str(folder): _study(folder) for folder in folders}


def _study(folder: Path) -> dict[str, Any]:
    try:
        rows = read_rows(find_results(folder))
    except ResultsError as error:
        raise UsageError(f"--studies: {error}") from error
    full, alone = ([row for row in rows if row["mode"] == mode] for mode in ("full", "controller_only"))
    found = paired(full, alone, "test_loss")
    if found["n_pairs"] < 2:
        raise UsageError(f"--studies: {folder} has no two seeds under both full and controller_only; run them")
    failed = {"full": full, "controller_only": alone}
    return {**found, "failed": {mode: sum(row["status"] != "ok" for row in rows) for mode, rows in failed.items()}}


def _shows_harm(study: Mapping[str, Any]) -> bool:
    """Whether the test loss rose for sure, or more runs failed."""
    ends, failed = study["interval95"], study["failed"]
    return (ends is not None and ends[0] > 0) or failed["full"] > failed["controller_only"]


def earned(evidence: Mapping[str, Mapping[str, Any]]) -> float:
    """ρ: 1 where the gain's whole interval lies above 0, no family's allows for harm of 5%, and no study shows harm.

    Example:
        >>> found = {"monitor": {"all": {"interval95": [0.01, 0.02]}, "vae": {"interval95": [-0.01, 0.05]}}}
        >>> study = {"interval95": [0.001, 0.02], "failed": {"full": 0, "controller_only": 0}}
        >>> earned(found), earned({**found, "studies": {"cifar10": study}})
        (1.0, 0.0)
    """
    intervals = [entry["interval95"] for entry in evidence["monitor"].values()]
    if any(ends is None or ends[0] < -HARM for ends in intervals):
        return 0.0
    if any(map(_shows_harm, evidence.get("studies", {}).values())):
        return 0.0
    return 1.0 if evidence["monitor"]["all"]["interval95"][0] > 0 else 0.0


def table(evidence: dict[str, dict[str, Any]]) -> str:
    """A line an arm and family."""
    lines = [f"{'arm':<10}{'family':<16}{'runs':>6}   gain over the controller alone, log J"]
    for arm in ARMS:
        for family, entry in evidence[arm].items():
            low, high = entry["interval95"] or (math.nan, math.nan)
            lines.append(f"{arm:<10}{family:<16}{entry['n']:>6}   {entry['mean']:+.4f} [{low:+.4f}, {high:+.4f}]")
    for name, entry in evidence.get("studies", {}).items():
        low, high = entry["interval95"] or (math.nan, math.nan)
        told = f"{entry['difference']:+.4f} [{low:+.4f}, {high:+.4f}]"
        lines += ["", f"study {name}, {entry['n_pairs']} seeds: test loss of full less controller_only {told}"]
    for arm, families in evidence.get("recovered", {}).items():
        lines += ["", f"{arm}: part of the gap to tuned weights recovered; runs lost"]
        lines += [_recovery_line(family, entry) for family, entry in families.items()]
    return "\n".join(lines)


def _recovery_line(family: str, entry: dict[str, Any] | None) -> str:
    if entry is None or entry["recovered"] is None:
        return f"  {family:<16}no gap that is sure" + ("" if entry is None else f"; gain {entry['gain']:+.3f}")
    low, high = entry["recovered95"] or (math.nan, math.nan)
    lost = f"; {entry['lost']} lost" if "lost" in entry else ""
    return f"  {family:<16}{entry['recovered']:+.2f} [{low:+.2f}, {high:+.2f}]{lost}"


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
    studies = {**_told(card), **studied(flags.studies)}
    evidence = {**measure(flags, network, law), **({"studies": studies} if studies else {})}
    rho, told = earned(evidence), command_line(PROG, argv)
    document = {"evidence": evidence, "rho": rho, "policy": card.get("sha256"), "provenance": provenance(told)}
    write_atomic(flags.output_dir / "evidence.json", json_dump(document))
    if flags.write:
        asked: dict[str, Any] = {"runs": flags.runs, "draws": flags.draws, "steps": flags.steps}
        asked |= {"rivals": True} if flags.rivals else {}
        asked |= {"studies": flags.studies, "write": True}
        found = {"command": command_of(PROG, asked), **evidence}
        trained_with = {"trained_with": card.get("trained_with", card.get("versions"))}
        write_policy(flags.policy, "monitor", network, {**card, **trained_with, "rho": rho, "evidence": found})
    print(table(evidence))
    print(f"rho by this evidence: {rho:g}" + (f", written to {flags.policy / 'monitor.json'}" if flags.write else ""))
    return 0


def _told(card: Mapping[str, Any]) -> dict[str, Any]:
    """The studies that the card tells of already: new evidence about the same networks does not undo them."""
    evidence = card["evidence"]
    return dict(evidence.get("studies", {})) if isinstance(evidence, dict) else {}


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
