"""Rules, modes and tuned weights beside each other: ``adaptive-loss compare vae --weightings fixed tuned adaptive``."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from adaptive_loss.errors import UsageError
from adaptive_loss.picture import curves, intervention_steps
from adaptive_loss.report.comparison import plane_picture, samples_picture, shares_picture
from adaptive_loss.report.pictures import weights_picture
from adaptive_loss.trainer.arms import GIVEN, Arm, rule_arm, sourced, started
from adaptive_loss.trainer.studies import Result, finished
from adaptive_loss.trainer.study import Study, StudyFlags, check_list, run_study
from adaptive_loss.trainer.task_flags import TaskFlags, completed
from adaptive_loss.trainer.tuning import read_tuned
from adaptive_loss.utils.commands import command, command_line, parse

PROG = "adaptive-loss compare"
FILE_NAME = "compare.csv"
RATE, DISTORTION = "test_kl", "test_reconstruction"
"""Where runs have both, they are drawn in the rate-distortion plane."""


@dataclass(frozen=True, kw_only=True)
class Flags(TaskFlags, StudyFlags):
    """The flags of a comparison."""

    weightings: tuple[str, ...] = ("fixed", "tuned", "adaptive")
    """The arms: rules on the start weights (fixed holds them), customary, tuned, adaptive, any mode, or a replay."""
    seeds: tuple[int, ...] = (1, 42, 123, 456, 789)
    """Seeds; every arm runs each of them, paired."""
    starts: tuple[str, ...] = (GIVEN,)
    """Where arms start: given weights, customary ones, or one term's too high or low: TERM*10, TERM/10."""
    trials: int = 24
    """Runs of the weight search behind the arm tuned."""
    tuned: Path | None = None
    """The trials.json of a search that is done, for the arm tuned."""


@command
def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    about = "Compare weighting rules, modes and tuned weights on a task, paired by seed."
    flags = completed(parse(Flags, argv, PROG, about), "compare")
    return run_study(study_of(flags, command_line(PROG, argv)), flags, draw)


def study_of(flags: Flags, argv: Sequence[str]) -> Study:
    """The study that the flags describe, judged by the task's own metric on the test split."""
    from adaptive_loss.tasks import tasks

    kind = tasks.get(flags.task)
    arms = arms_of(flags, kind.all_terms())
    tuned = None if flags.tuned is None else read_tuned(flags.tuned, flags.task)
    if tuned is not None and "tuned" not in [arm.name for arm in arms]:
        raise UsageError(f"--tuned {flags.tuned}: no arm takes it; add tuned to --weightings")
    return Study(
        flags,
        arms,
        flags.seeds,
        flags.output_dir / FILE_NAME,
        flags.output_dir,
        flags.trials,
        tuple(argv),
        tuned=tuned,
        comparisons=tuple(pairs_of(arms)),
        metric=f"test_{kind.metric}",
    )


def arms_of(flags: Flags, terms: Sequence[str]) -> tuple[Arm, ...]:
    """Every arm from every start; those with start weights of their own once."""
    asked = sourced([rule_arm(name, "--weightings") for name in flags.weightings], "--weightings")
    check_list("weightings", [arm.name for arm in asked])
    check_list("starts", flags.starts)
    arms = dict.fromkeys(started(arm, start) for start in flags.starts for arm in asked)
    strange = [arm.factor[0] for arm in arms if arm.factor is not None and arm.factor[0] not in terms]
    if strange:
        raise UsageError(f"--starts names the unknown term {strange[0]!r}; choose from: {', '.join(terms)}")
    return tuple(arms)


def pairs_of(arms: Sequence[Arm]) -> list[tuple[str, str]]:
    """Within a start every other arm with the first, then each with those that have start weights of their own."""
    own = [arm.name for arm in arms if arm.start in ("tuned", "customary") and "/" not in arm.name]
    starts: dict[str, list[str]] = {}
    for arm in arms:
        if arm.name not in own:
            starts.setdefault(arm.name.partition("/")[2], []).append(arm.name)
    pairs = [(name, names[0]) for names in starts.values() for name in names[1:]]
    return pairs + [(name, other) for other in own for names in starts.values() for name in names]


def draw(study: Study, rows: Sequence[Result]) -> list[Path]:
    """The pictures of the runs that are done, those over time of each arm's first seed; the files written."""
    runs: dict[str, Path] = {}
    for spec in study.specs():
        if finished(spec) is not None:
            runs.setdefault(spec.label, spec.folder)
    if not runs:
        return []
    return [*_over_time(study, runs), *_samples(study, runs), *_rate_distortion(study, rows)]


def _over_time(study: Study, runs: Mapping[str, Path]) -> list[Path]:
    """Weights and shares over the steps, a panel an arm."""
    weights, losses = ({arm: curves(run, column) for arm, run in runs.items()} for column in ("weight", "loss"))
    acted = {arm: intervention_steps(run) for arm, run in runs.items()}
    files = [study.folder / "weights.png", study.folder / "shares.png"]
    seed = f"{study.settings.task}, seed {study.seeds[0]}"
    weights_picture(weights, files[0], title=f"Loss weights, {seed}", interventions=acted)
    shares_picture(losses, weights, files[1], title=f"Shares of the total, {seed}")
    return files


def _samples(study: Study, runs: Mapping[str, Path]) -> list[Path]:
    """The last of each of the runs' own pictures, those of all arms beside each other; none where there are none."""
    last = {arm: _last_pictures(run) for arm, run in runs.items()}
    files = []
    for name in dict.fromkeys(name for pictures in last.values() for name in pictures):
        shown = {arm: pictures[name] for arm, pictures in last.items() if name in pictures}
        files.append(study.folder / f"pictures_{name}.png")
        samples_picture(shown, files[-1], title=f"{study.settings.task}: {name.replace('_', ' ')}")
    return files


def _last_pictures(run: Path) -> dict[str, Path]:
    """By name, the latest of ``pictures/<name>_<step>.png``."""
    files = sorted((run / "pictures").glob("*.png"))
    return {re.sub(r"_\d+$", "", file.stem): file for file in files}


def _rate_distortion(study: Study, rows: Sequence[Result]) -> list[Path]:
    """Every run's KL divergence and reconstruction, with a line through the arms whose weights stay fixed."""
    points: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row.get(RATE) is not None and row.get(DISTORTION) is not None:
            points.setdefault(row["mode"], []).append((row[RATE], row[DISTORTION]))
    if not points:
        return []
    fixed = [arm.name for arm in study.arms if arm.name in points and _is_fixed(study, arm)]
    file, axes = study.folder / "rate_distortion.png", ("rate: KL, nats an example", "distortion: reconstruction")
    plane_picture(points, file, title=f"{study.settings.task}: rate and distortion", axes=axes, line=fixed)
    return [file]


def _is_fixed(study: Study, arm: Arm) -> bool:
    return arm.mode == "baseline" and (arm.weighting or study.settings.weighting) == "fixed"


if __name__ == "__main__":
    sys.exit(main())
