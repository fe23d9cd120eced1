"""Fixed KL weights against one run of the look-ahead rule from wrong ones, on a convolutional VAE of Fashion-MNIST.

    python -m benchmarks.generative --data-dir data

Every run is `adaptive-loss train vae --dataset fashion_mnist --quick`; runs that are done are not done again. The
numbers are of the test set, at the last epoch, in judging features that no probe uses.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from adaptive_loss.records import json_dump, provenance, write_atomic
from adaptive_loss.tasks import tasks
from adaptive_loss.trainer.progress import Progress
from adaptive_loss.trainer.studies import Result, Spec, run_all
from adaptive_loss.utils.commands import command, command_line, parse
from adaptive_loss.utils.config import RunConfig

PROG = "python -m benchmarks.generative"
GRID = (0.01, 0.1, 1.0, 10.0, 100.0)
WRONG = (0.01, 100.0)
METRICS = ("test_own_kid", "test_own_frechet", "test_bits_per_dim")


@dataclass(frozen=True, kw_only=True)
class Flags:
    """The flags of the benchmark."""

    seeds: tuple[int, ...] = (1, 2, 3)
    """Seeds; every arm runs each of them, paired."""
    data_dir: Path = Path("data")
    """Where Fashion-MNIST is, or is downloaded to."""
    output_dir: Path = Path("results/generative")
    """Where the runs and table.json go."""
    jobs: int = 1
    """Runs at a time; 0 is one a core."""


def arms(flags: Flags) -> dict[str, RunConfig]:
    """By name, the runs to compare, their seed still open."""
    common = {"task": "vae", "dataset": "fashion_mnist", "data_dir": flags.data_dir, **tasks.get("vae").quick}
    fixed = {f"fixed {kl:g}": RunConfig(**common, weights={"kl": kl}) for kl in GRID}
    adaptive = {
        f"{objective} from {kl:g}": RunConfig(**common, mode="lookahead_only", objective=objective, weights={"kl": kl})
        for objective in tasks.get("vae").objectives
        for kl in WRONG
    }
    return fixed | adaptive


def specs(flags: Flags) -> list[Spec]:
    """Every run, a whole seed after the other."""
    return [
        Spec(name, replace(config, seed=seed), flags.output_dir / name.replace(" ", "_") / f"seed_{seed}")
        for seed in flags.seeds
        for name, config in arms(flags).items()
    ]


def table(rows: Sequence[Result]) -> str:
    """A line an arm: the mean over its seeds of each metric and of the KL weight it ended with."""
    lines = [f"{'arm':<24}{'last kl weight':>15}" + "".join(f"{name.removeprefix('test_'):>16}" for name in METRICS)]
    for name in dict.fromkeys(row["mode"] for row in rows):
        done = [row for row in rows if row["mode"] == name and row["status"] == "ok"]
        failed = sum(row["mode"] == name for row in rows) - len(done)
        if done:
            weight = statistics.fmean(row["weights"]["final"]["kl"] for row in done)
            means = (statistics.fmean(row[metric] for row in done) for metric in METRICS)
            lines.append(f"{name:<24}{weight:>15.3g}" + "".join(f"{mean:>16.4g}" for mean in means))
        if failed:
            lines.append(f"{name:<24}{failed} failed")
    return "\n".join(lines)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    flags = parse(Flags, argv, PROG, "Fixed KL weights against the look-ahead rule, on a VAE of Fashion-MNIST.")
    todo = specs(flags)
    with Progress(len(todo)) as progress:
        rows = run_all(todo, flags.jobs, quiet=True, on_row=progress.done)
    document = {"rows": rows, "provenance": provenance(command_line(PROG, argv))}
    write_atomic(flags.output_dir / "table.json", json_dump(document))
    print(table(rows))
    if len(flags.seeds) < 5:
        print("Warning: fewer than five seeds prove nothing")
    return 0 if all(row["status"] == "ok" for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
