"""Meta-training of the controller's law by CMA-ES on the final loss of small training runs.

    python -m adaptive_loss.meta.train --seed 0 --output controller.json

Each generation draws new problems from every family; a candidate law's cost is the mean over them of
log(final loss) − log(final loss of the rule it starts from), clipped to ±1, paired by data, initialisation and order.
There are no unrolls, hence no short-horizon bias. What the search finds is its distribution's mean, and that law is
then compared with the rule on problems that the search never saw. It becomes the policy's law only if the whole 95%
interval of that comparison is below 0, and no family's interval allows for harm of more than 5%; else the rule stays,
and the card says what was found and why it does not ship.
The same seed gives the same file; another seed another.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from adaptive_loss.errors import UsageError
from adaptive_loss.meta.costs import draw_problems, one_thread_cost
from adaptive_loss.meta_controller import CLIMB, ControllerLaw
from adaptive_loss.policy_files import POLICIES, write_policy
from adaptive_loss.utils.commands import command, parse
from adaptive_loss.utils.config import core_count

PROG = "python -m adaptive_loss.meta.train"
SPREAD = ControllerLaw(
    gain=3.0,
    against_base=3.0,
    early_step=1.0,
    late_step=1.0,
    calibration=1.0,
    early_band=0.5,
    late_band=0.5,
    trust=(1.0,) * len(CLIMB.trust),
    features=(0.3,) * len(CLIMB.features),
    late_features=(0.3,) * len(CLIMB.late_features),
    drift=(0.3,) * len(CLIMB.drift),
)
"""First step sizes of the search, in units of ``--sigma``: wide where the rule has a number, narrow where it has 0."""
HARM = 0.05
"""Log-ratio of final losses above which no family's interval may reach: one family's gain must not pay for another."""
HELD_OUT_SEEDS = 1_000_000
"""Problems for the comparison have seeds from here on, which no generation reaches."""


@dataclass(frozen=True, kw_only=True)
class MetaTrainFlags:
    """Meta-train the controller's law."""

    seed: int = 0
    """Seed of the search and of its problems."""
    generations: int = 16
    """Generations of the evolution strategy."""
    population: int = 12
    """Candidate laws a generation."""
    problems: int = 12
    """Problems a generation, spread over the families."""
    held_out: int = 60
    """Fresh problems for the comparison with the rule at the end."""
    sigma: float = 0.1
    """First step size of the search."""
    jobs: int = 0
    """Processes; 0 is one a core."""
    output: Path = POLICIES / "controller.json"
    """Where the law's card goes; its numbers go beside it, as .safetensors."""


def bounded(vector: Sequence[float]) -> ControllerLaw:
    """A law from any point of the search space: steps in [0, 1.4] nats, κ and calibration in [0, 1], τ in [0, 0.9]."""
    law = CLIMB.with_vector([float(v) for v in vector])
    return replace(
        law,
        early_step=max(0.0, min(1.4, law.early_step)),
        late_step=max(0.0, min(1.4, law.late_step)),
        calibration=max(0.0, min(1.0, law.calibration)),
        against_base=max(0.0, min(1.0, law.against_base)),
        early_band=max(0.0, min(0.9, law.early_band)),
        late_band=max(0.0, min(0.9, law.late_band)),
    )


def search(flags: MetaTrainFlags) -> tuple[ControllerLaw, list[float]]:
    """Run CMA-ES from the rule; the mean law and each generation's mean cost."""
    import cma
    from joblib import Parallel, delayed

    options: dict[str, Any] = {
        "popsize": flags.population,
        "seed": flags.seed + 1,
        "verbose": -9,
        "maxiter": flags.generations,
    }
    options["CMA_stds"] = SPREAD.to_vector()
    strategy = cma.CMAEvolutionStrategy(CLIMB.to_vector(), flags.sigma, options)
    curve: list[float] = []
    with Parallel(n_jobs=flags.jobs or core_count()) as workers:
        for generation in range(flags.generations):
            problems = draw_problems(flags.problems, (flags.seed * flags.generations + generation) * flags.problems)
            candidates = strategy.ask()
            costs: list[float] = list(workers(delayed(one_thread_cost)(bounded(c), problems) for c in candidates))  # pyright: ignore
            strategy.tell(candidates, costs)
            curve.append(statistics.fmean(costs))
            print(
                f"generation {generation + 1}/{flags.generations}: mean cost {curve[-1]:+.4f}, best {min(costs):+.4f}",
                flush=True,
            )
    return bounded(list(strategy.mean)), curve  # pyright: ignore[reportArgumentType]


def compare_with_rule(law: ControllerLaw, flags: MetaTrainFlags) -> dict[str, Any]:
    """Law against rule on fresh problems: mean log-ratio of final losses and its 95% interval, whole and by family."""
    from joblib import Parallel, delayed

    from adaptive_loss.trainer.simple_ablation_analysis import bca_interval

    problems = draw_problems(flags.held_out, HELD_OUT_SEEDS)
    workers = Parallel(n_jobs=flags.jobs or core_count())
    found: list[float] = list(workers(delayed(one_thread_cost)(law, [p]) for p in problems))  # pyright: ignore
    groups = {"all": found}
    for (family, _), value in zip(problems, found, strict=True):
        groups.setdefault(family, []).append(value)
    return {
        name: {"n": len(values), "mean_log_ratio": statistics.fmean(values), "interval95": bca_interval(values)}
        for name, values in groups.items()
    }


def doubt(evidence: dict[str, Any]) -> str | None:
    """Why the law that was found does not ship, or None where it may."""
    intervals = {name: entry["interval95"] for name, entry in evidence.items()}
    if intervals["all"] is None or intervals["all"][1] >= 0:
        return "the law that was found does not beat it for sure"
    harmed = [name for name, ends in intervals.items() if ends is None or ends[1] > HARM]
    return f"the law that was found may do harm, on: {', '.join(harmed)}" if harmed else None


def write(flags: MetaTrainFlags, found: ControllerLaw, curve: Sequence[float], evidence: dict[str, Any]) -> None:
    """Write the law that ships; its card tells the law that was found, and the evidence between them."""
    reason = doubt(evidence)
    ships = CLIMB if reason else found
    settings = {name: value for name, value in asdict(flags).items() if name not in ("output", "jobs")}
    card = {
        "climbs": ships.climbs,
        "ships": f"the rule: {reason}" if reason else "the law that was found",
        "found": asdict(found),
        "families": [name for name in evidence if name != "all"],
        "seeds": [flags.seed],
        "made_by": f"{PROG} " + " ".join(f"--{name.replace('_', '-')} {value}" for name, value in settings.items()),
        "settings": settings,
        "cost_by_generation": curve,
        "evidence": {"against_the_rule_on_fresh_problems": evidence},
    }
    write_policy(flags.output.parent, flags.output.stem, ships.tensors(), card)


def run(flags: MetaTrainFlags) -> int:
    """Search, compare, write the law with its card; the exit code."""
    for name in ("generations", "population", "problems", "held_out"):
        if getattr(flags, name) < 2:
            raise UsageError(f"--{name.replace('_', '-')} is {getattr(flags, name)}; give at least 2")
    most = HELD_OUT_SEEDS // (flags.generations * flags.problems) - 1
    if not 0 <= flags.seed <= most:
        raise UsageError(f"--seed is {flags.seed}; give 0 to {most}, so that the held-out problems stay unseen")
    if not (math.isfinite(flags.sigma) and flags.sigma > 0):
        raise UsageError(f"--sigma is {flags.sigma}; give a finite number above 0")
    if flags.jobs < 0:
        raise UsageError(f"--jobs is {flags.jobs}; give 1 or more, or 0 for one a core")
    if flags.output.is_dir():
        raise UsageError(f"--output {flags.output} is a folder; give a file")
    if flags.output.suffix != ".json":
        raise UsageError(f"--output {flags.output} is no .json file; name the card, such as controller.json")
    law, curve = search(flags)
    evidence = compare_with_rule(law, flags)
    write(flags, law, curve, evidence)
    print(f"law against rule on fresh problems (log-ratio of final losses, below 0 is better): {evidence['all']}")
    print(f"written: {flags.output}")
    return 0


@command
def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return run(parse(MetaTrainFlags, argv, PROG, "Meta-train the controller's law on small training runs."))


if __name__ == "__main__":
    raise SystemExit(main())
