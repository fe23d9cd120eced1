"""One run from its flags to its result, in OUTPUT_DIR/<mode>/seed_<seed>/ like a study's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from adaptive_loss.errors import RunError, UsageError
from adaptive_loss.records import json_dump
from adaptive_loss.trainer import plan
from adaptive_loss.trainer.arms import mode_arm
from adaptive_loss.trainer.progress import outcome
from adaptive_loss.trainer.studies import Spec, check_folders, finished, run_all, worker_count
from adaptive_loss.trainer.study import check_settings, prepare
from adaptive_loss.utils.config import Settings, run_config, validate


@dataclass(frozen=True, kw_only=True)
class SingleFlags(Settings):
    """What every command that trains once takes besides the settings of its run."""

    seed: int = 42
    """Seed of initialisation, order and augmentation."""
    output_dir: Annotated[Path, tyro.conf.arg(aliases=("--logdir",))] = Path("results/train")
    """Where the run's folder <mode>/seed_<seed> goes; --logdir is the same."""
    jobs: int = 0
    """Taken by every command; one run needs one process."""
    dry_run: bool = False
    """Show what would run, the time and the disk, and start nothing."""
    json: bool = False
    """Print the result as one JSON document."""


def run_single(flags: SingleFlags, mode: str) -> int:
    """Train once, or say that it is done already; the exit code."""
    arm = mode_arm(mode)
    config = run_config(flags, mode=arm.mode, seed=flags.seed, weights=arm.weights(flags))
    if mode == "tuned" and not flags.weights:
        raise UsageError(
            "mode tuned needs the weights that a search found: --weights term=value …, from its trials.json"
        )
    validate(config)
    worker_count(flags.jobs)
    spec = Spec(mode, config, flags.output_dir / mode / f"seed_{flags.seed}")
    check_folders([spec])
    check_settings(flags)
    if flags.dry_run:
        return plan.show([spec], flags.jobs, flags.json)
    known = finished(spec) is not None
    if not known:
        prepare(flags)
    (row,) = run_all([spec], jobs=1, quiet=flags.json)
    if row["status"] != "ok":
        raise RunError(f"{mode} seed {flags.seed} {row['status']}; the traceback is in {spec.folder / 'error.txt'}")
    text = f"{mode} seed {flags.seed}: {outcome(row)}{' (done before)' if known else ''}\nwritten: {spec.folder}"
    print(json_dump({**row, "folder": str(spec.folder)}).rstrip() if flags.json else text)
    return 0
