"""``adaptive-loss pretrain controller``: meta-training of the controller's law by CMA-ES on the final loss.

Each generation draws new runs from every family; a candidate law's cost is the mean over families of
log(final loss) − log(final loss of the law it starts from), clipped to ±1 a run, paired by data, initialisation and
order. There are no unrolls, hence no short-horizon bias. What the search finds is its distribution's mean, and that law
is then compared with the first one on runs that the search never saw. It becomes the policy's law only if the whole
95% interval of that comparison is below 0, and no family's interval allows for harm of more than 5%; else the first law
stays, and the card says what was found and why it does not ship. The same seed gives the same files; another seed
others. Every generation is kept in ``search.json``, and the same command goes on from it.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from adaptive_loss.errors import UsageError
from adaptive_loss.meta.costs import one_thread_cost, one_thread_differences
from adaptive_loss.meta.pretrain_flags import PretrainFlags
from adaptive_loss.meta.problems import HELD_OUT_SEEDS, VALIDATION_SEEDS, command_of, draw_problems, summarised
from adaptive_loss.meta_controller import CLIMB, ControllerLaw
from adaptive_loss.policy_files import write_policy
from adaptive_loss.records import json_dump, write_atomic
from adaptive_loss.utils.commands import command, parse
from adaptive_loss.utils.config import core_count

PROG = "adaptive-loss pretrain controller"
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
"""First step sizes of the search, in units of ``--sigma``: wide where the law has a number, narrow where it has 0."""
HARM = 0.05
"""Log-ratio of final losses above which no family's interval may reach: one family's gain must not pay for another."""


@dataclass(frozen=True, kw_only=True)
class Flags(PretrainFlags):
    """The flags of the controller's meta-training."""

    generations: int = 16
    """Generations of the evolution strategy."""
    population: int = 12
    """Candidate laws a generation."""
    runs: int = 4
    """Runs of each family a generation."""
    held_out: int = 4
    """Fresh runs of each family and of each of four draws, for the comparison at the end."""
    sigma: float = 0.1
    """First step size of the search."""
    output_dir: Path = Path("results/controller_policy")
    """Where controller.safetensors, controller.json and search.json go: a folder that --policy takes."""


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


def search(flags: Flags, names: Sequence[str]) -> tuple[ControllerLaw, list[float]]:
    """Run CMA-ES from the first law; the mean law and each generation's mean cost."""
    import cma
    from joblib import Parallel, delayed

    options: dict[str, Any] = {
        "popsize": flags.population,
        "seed": flags.seed + 1,
        "verbose": -9,
        "maxiter": flags.generations,
        "CMA_stds": SPREAD.to_vector(),
    }
    strategy = cma.CMAEvolutionStrategy(CLIMB.to_vector(), flags.sigma, options)
    kept = _kept(flags)
    with Parallel(n_jobs=flags.jobs or core_count()) as workers:
        for generation in range(flags.generations):
            candidates = strategy.ask()
            if generation == len(kept):
                problems = draw_problems(names, flags.runs, (flags.seed * flags.generations + generation) * flags.runs)
                calls = (delayed(one_thread_cost)(bounded(c), problems, flags.steps) for c in candidates)
                kept.append([float(cost) for cost in workers(calls)])  # pyright: ignore
                write_atomic(flags.output_dir / "search.json", json_dump({"settings": flags.settings(), "costs": kept}))
                told = f"mean cost {statistics.fmean(kept[-1]):+.4f}, best {min(kept[-1]):+.4f}"
                print(f"generation {generation + 1}/{flags.generations}: {told}", flush=True)
            strategy.tell(candidates, kept[generation])
    return bounded(list(strategy.mean)), [statistics.fmean(costs) for costs in kept]  # pyright: ignore[reportArgumentType]


def _kept(flags: Flags) -> list[list[float]]:
    """The costs of the generations that are done: told again, they bring the strategy to where it stopped."""
    file = flags.output_dir / "search.json"
    if not file.exists():
        return []
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        theirs, costs = document["settings"], [[float(cost) for cost in costs] for costs in document["costs"]]
    except (OSError, ValueError, KeyError, TypeError):
        raise UsageError(f"{file} is no search that can go on; move it away or choose another --output-dir") from None
    if theirs != flags.settings() or any(len(costs) != flags.population for costs in costs):
        raise UsageError(f"{file} is a search with other settings; choose another --output-dir")
    return costs


def compare_with_first(law: ControllerLaw, flags: Flags, names: Sequence[str]) -> dict[str, Any]:
    """Law against the first law on fresh runs: mean log-ratio of final losses and its interval, whole and by family."""
    from joblib import Parallel, delayed

    problems = draw_problems(names, flags.held_out, HELD_OUT_SEEDS, draws=4)
    workers = Parallel(n_jobs=flags.jobs or core_count())
    found = workers(delayed(one_thread_differences)(law, problem, flags.steps) for problem in problems)
    groups: dict[str, list[float]] = {}
    for problem, values in zip(problems, found, strict=True):  # pyright: ignore[reportArgumentType]
        groups.setdefault(problem.family, []).extend(values)  # pyright: ignore[reportArgumentType]
    return summarised(groups)


def doubt(evidence: dict[str, Any]) -> str | None:
    """Why the law that was found does not ship, or None where it may."""
    intervals = {name: entry["interval95"] for name, entry in evidence.items()}
    if intervals["all"] is None or intervals["all"][1] >= 0:
        return "the law that was found does not beat it for sure"
    harmed = [name for name, ends in intervals.items() if ends is None or ends[1] > HARM]
    return f"the law that was found may do harm, on: {', '.join(harmed)}" if harmed else None


def write(flags: Flags, found: ControllerLaw, curve: Sequence[float], evidence: dict[str, Any]) -> None:
    """The policy: the law that ships, and on its card the law that was found and the evidence between them."""
    reason = doubt(evidence)
    ships = CLIMB if reason else found
    card = {
        "climbs": ships.climbs,
        "ships": f"the first law: {reason}" if reason else "the law that was found",
        "found": asdict(found),
        "families": [name for name in evidence if name != "all"],
        "seeds": [flags.seed],
        "made_by": command_of(PROG, flags.settings()),
        "settings": flags.settings(),
        "cost_by_generation": list(curve),
        "evidence": {"log_ratio_to_the_first_law_on_fresh_runs": evidence},
    }
    write_policy(flags.output_dir, "controller", ships.tensors(), card)


def run(flags: Flags) -> int:
    """Search, compare, write the law with its card; the exit code."""
    _check(flags)
    names = flags.names
    law, curve = search(flags, names)
    evidence = compare_with_first(law, flags, names)
    write(flags, law, curve, evidence)
    print(f"law against the first one on fresh runs (log-ratio of losses, below 0 is better): {evidence['all']}")
    print(f"written: {flags.output_dir / 'controller.json'}")
    return 0


def _check(flags: Flags) -> None:
    least = {"generations": 2, "population": 2, "runs": 1, "held_out": 1, "steps": 20}
    flags.check(least, seeds=VALIDATION_SEEDS // max(flags.generations * flags.runs, 1))
    if not (math.isfinite(flags.sigma) and flags.sigma > 0):
        raise UsageError(f"--sigma is {flags.sigma}; give a finite number above 0")


@command
def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    flags = parse(Flags, argv, PROG, "Meta-train the controller's law on small training runs.")
    return run(flags)
