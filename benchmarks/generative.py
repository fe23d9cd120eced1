"""Fixed KL weights against one run of the controller from right and wrong ones, on a VAE.

    python -m benchmarks.generative --dataset digits

Every run is `adaptive-loss train vae --quick`; runs that are done are not done again. The numbers are of the test set,
at the last epoch; the distances are in judging features that no probe uses. Bits per dimension judge the arms with the
objective `elbo`, the distances those with `sample_quality`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from adaptive_loss.tasks import tasks
from adaptive_loss.utils.commands import command, parse
from adaptive_loss.utils.config import RunConfig
from benchmarks import arms as study

PROG = "python -m benchmarks.generative"
GRID = (0.01, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0)
STARTS = (0.01, 0.1, 1.0, 10.0, 100.0)
COLUMNS: study.Columns = {
    "bits_per_dim": study.column("bits_per_dim"),
    "own_kid": study.column("own_kid"),
    "own_frechet": study.column("own_frechet"),
    "kl": study.column("kl"),
    "last_weight": lambda row: row["weights"]["final"]["kl"],
}


@dataclass(frozen=True, kw_only=True)
class Flags(study.Flags):
    """The flags of the benchmark."""

    dataset: Literal["digits", "fashion_mnist"] = "fashion_mnist"
    """What the VAE learns."""
    output_dir: Path = Path("results/generative")
    """Where the runs, table.csv and table.json go."""


def arms(flags: Flags) -> dict[str, RunConfig]:
    """By name, the runs to compare, their seed still open."""
    common = {"task": "vae", "dataset": flags.dataset, "data_dir": flags.data_dir, **tasks.get("vae").quick}
    fixed = {f"fixed {kl:g}": RunConfig(**common, weights={"kl": kl}) for kl in GRID}
    adaptive = {
        f"{objective} from {kl:g}": RunConfig(**common, mode="controller_only", objective=objective, weights={"kl": kl})
        for objective in tasks.get("vae").objectives
        for kl in STARTS
    }
    return fixed | adaptive


@command
def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    flags = parse(Flags, argv, PROG, "Fixed KL weights against one run of the controller, on a VAE.")
    return study.exit_code(study.conduct(PROG, argv, flags, arms(flags), COLUMNS))


if __name__ == "__main__":
    sys.exit(main())
