"""The pictures of one run: ``adaptive-loss picture results/ablation_study/full/seed_42``."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from adaptive_loss.errors import RunError, UsageError
from adaptive_loss.report.pictures import losses_and_shares, weights_picture
from adaptive_loss.trainer.simple_ablation_analysis import printable
from adaptive_loss.utils.commands import command, parse

PROG = "adaptive-loss picture"


@dataclass(frozen=True, kw_only=True)
class Flags:
    """The flags of the pictures of one run."""

    run: tyro.conf.Positional[Path]
    """A run's folder, the one that holds metrics.csv."""
    output_dir: Path | None = None
    """Where weights and losses go; the run's own folder where it is not given."""
    format: Literal["png", "svg", "pdf"] = "png"
    """What kind of file."""
    json: bool = False
    """Print the files' names, and what the monitor did, as one JSON document."""


def curves(run: Path, column: str) -> dict[str, list[float]]:
    """``step`` and the series ``<column>_<term>`` of every term that is on, a value an epoch, from ``metrics.csv``.

    Raises:
        UsageError: there is no ``metrics.csv``.
        RunError: it is damaged, or its first epoch is not over.
    """
    file = run / "metrics.csv"
    if not file.is_file():
        raise UsageError(f"{run} has no metrics.csv: name a run's folder, such as results/ablation_study/full/seed_42")
    try:
        rows = list(csv.DictReader(file.read_text(encoding="utf-8").splitlines()))
        terms = [name.removeprefix("loss_") for name in rows[0] if name.startswith("loss_") and rows[0][name]]
        series = {term: [float(row[f"{column}_{term}"]) for row in rows] for term in terms}
        return {"step": [float(row["step"]) for row in rows], **series}
    except (IndexError, KeyError, TypeError, ValueError, AttributeError, csv.Error) as error:
        reason = f"{type(error).__name__}: {error}"
        raise RunError(f"{file} is damaged or has no epoch yet ({reason}); run it again") from None


def intervention_steps(run: Path) -> list[int]:
    """The steps of ``events.jsonl``; none where the file is missing. A last line that was torn is left out."""
    file = run / "events.jsonl"
    lines = file.read_bytes().splitlines() if file.is_file() else []
    steps = []
    for line in lines:
        try:
            steps.append(int(json.loads(line)["step"]))
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            continue
    return steps


def monitor_text(run: Path) -> str | None:
    """One line on what the monitor did, or in shadow would have done; None where ``result.json`` tells of none."""
    try:
        told = json.loads((run / "result.json").read_text(encoding="utf-8"))["monitor"]
        shadow = not told["rho"]
        actions = ", ".join(f"{action} {int(count)}x" for action, count in told["suggestions"].items())
        residual = ", ".join(f"{term} {float(u):+.2f}" for term, u in told["residual"].items() if u)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return None
    did, stands = ("in shadow (rho 0) would have done", "would stand") if shadow else ("did", "stands")
    return printable(f"the monitor {did}: {actions or 'nothing'}; its residual {stands} at {residual or '0'} nats")


def draw(run: Path, folder: Path, suffix: str) -> list[Path]:
    """Draw the weights, and the losses with their shares of the total; the files written."""
    weights, losses, acted = curves(run, "weight"), curves(run, "loss"), intervention_steps(run)
    title = "/".join(run.resolve().parts[-2:])
    if folder.is_file():
        raise UsageError(f"--output-dir {folder} is a file, not a folder; choose another")
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{name}.{suffix}" for name in ("weights", "losses")]
    weights_picture({title: weights}, files[0], title="Loss weights", interventions={title: acted})
    losses_and_shares(losses, weights, files[1], title=f"Losses and their shares, {title}", interventions=acted)
    return files


@command
def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    flags = parse(Flags, argv, PROG, "Draw what the weights and losses of one run did.")
    files = [str(file) for file in draw(flags.run, flags.output_dir or flags.run, flags.format)]
    told = monitor_text(flags.run)
    lines = [*([] if told is None else [told]), *(f"written: {file}" for file in files)]
    print(json.dumps({"files": files, "monitor": told}) if flags.json else "\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
