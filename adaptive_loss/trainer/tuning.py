"""The tuned baseline: the best fixed weights that a seeded random search of full-length runs finds."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from adaptive_loss.errors import RunError
from adaptive_loss.records import json_dump, write_atomic
from adaptive_loss.trainer.studies import OnRow, Result, Run, Spec, run_all
from adaptive_loss.utils.config import RunConfig

TUNING_SEED = 0  # of the search and of its runs: none of the studies' own seeds, so that tuning never sees theirs
LOWEST, HIGHEST = -3.0, 1.0  # decimal exponents of a trial's weights


def trial_weights(terms: Sequence[str], trials: int, seed: int = TUNING_SEED) -> list[dict[str, float]]:
    """``trials`` draws of start weights: the first term, the base, stays 1; each other is log-uniform in [1e-3, 10].

    Example:
        >>> trial_weights(["ce", "kd"], 1)[0]["ce"]
        1.0
    """
    draw = random.Random(seed)
    base, *others = terms
    return [{base: 1.0} | {term: 10 ** draw.uniform(LOWEST, HIGHEST) for term in others} for _ in range(trials)]


def trial_specs(base: RunConfig, terms: Sequence[str], folder: Path, trials: int) -> list[Spec]:
    """The runs of the search: ``baseline`` at full length with each trial's weights, and the test split unread."""
    config = replace(base, mode="baseline", seed=TUNING_SEED, read_test=False)
    return [
        Spec(f"trial_{i:02d}", replace(config, weights=weights), folder / "trials" / f"trial_{i:02d}")
        for i, weights in enumerate(trial_weights(terms, trials))
    ]


def find_weights(
    base: RunConfig,
    terms: Sequence[str],
    folder: Path,
    trials: int = 24,
    jobs: int = 0,
    *,
    quiet: bool = True,
    run: Run | None = None,
    on_row: OnRow | None = None,
) -> dict[str, float]:
    """The weights of the trial with the best accuracy on the select split; a tie goes to the lower select loss.

    Trials that are done are not done again; all of them are recorded in ``folder/trials.json``.

    Args:
        base: the study's settings; its mode, seed and weights are replaced.
        terms: the task's terms, the base first.
        folder: where ``trials/trial_XX/`` and ``trials.json`` go.

    Raises:
        RunError: no trial finished.
    """
    specs = trial_specs(base, terms, folder, trials)
    rows = run_all(specs, jobs, quiet, run=run, on_row=on_row)
    records = [_record(spec, row) for spec, row in zip(specs, rows, strict=True)]
    finished = [record for record in records if record["status"] == "ok" and record["select_accuracy"] is not None]
    best = min(finished, key=_rank, default=None)
    document = {"seed": TUNING_SEED, "chosen": best and best["trial"], "trials": records}
    write_atomic(folder / "trials.json", json_dump(document))
    if best is None:
        raise RunError(f"none of the {trials} tuning trials finished; their tracebacks are in {folder / 'trials'}")
    return best["weights"]


def _record(spec: Spec, row: Result) -> dict[str, Any]:
    measured = {name: row.get(name) for name in ("status", "select_accuracy", "select_loss")}
    return {"trial": spec.label, "weights": spec.config.weights, **measured}


def _rank(record: dict[str, Any]) -> tuple[float, float]:
    loss = record["select_loss"]
    return -record["select_accuracy"], float("inf") if loss is None else loss
