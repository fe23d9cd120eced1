"""The demo: fixed against adaptive weights on embedded data, with a verdict table and a picture, in under 90 s."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaptive_loss.records import json_dump, provenance, write_atomic
from adaptive_loss.trainer.progress import Progress
from adaptive_loss.trainer.simple_ablation_analysis import bca_interval
from adaptive_loss.trainer.studies import Result, Spec, run_all
from adaptive_loss.trainer.study import check_seeds, report_failures
from adaptive_loss.utils.commands import command, command_line, parse
from adaptive_loss.utils.config import RunConfig

PROG = "adaptive-loss demo"
ARMS = {"fixed": "baseline", "adaptive": "adaptive"}
WRONG_KL = 10.0


@dataclass(frozen=True, kw_only=True)
class Flags:
    """The flags of the demo."""

    seeds: tuple[int, ...] = (1, 2, 3)
    """Seeds; both arms run each of them, paired."""
    output_dir: Path = Path("results/demo")
    """Where runs, verdict and pictures go."""
    jobs: int = 0
    """Runs at a time; 0 is one a core."""
    json: bool = False
    """Print the verdict as one JSON document."""


@dataclass(frozen=True)
class Scene:
    """One comparison of the demo: a task from start weights that nobody tuned."""

    title: str
    config: RunConfig
    metrics: dict[str, str]


SCENES = {
    "classifier": Scene(
        "digits classifier, 4 auxiliaries at weight 1",
        RunConfig(task="classify", dataset="digits", epochs=8, batch_size=50),
        {"test_loss": "cross-entropy, lower is better", "test_accuracy": "accuracy, higher is better"},
    ),
    "vae": Scene(
        f"digits VAE, KL weight {WRONG_KL:g} (a wrong guess)",
        RunConfig(task="vae", dataset="digits", epochs=60, lr=3e-3, batch_size=50, weights={"kl": WRONG_KL}),
        {"test_loss": "-ELBO in nats, lower is better"},
    ),
}


@command
def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    flags = parse(Flags, argv, PROG, "Train fixed against adaptive weights on embedded data, and draw what happened.")
    check_seeds(flags.seeds)
    started = time.perf_counter()
    specs = {
        (scene, arm, seed): _spec(flags, scene, arm, seed) for scene in SCENES for arm in ARMS for seed in flags.seeds
    }
    with Progress(len(specs)) as progress:
        rows = run_all(list(specs.values()), flags.jobs, quiet=True, on_row=progress.done)
    results = dict(zip(specs, rows, strict=True))
    verdict = [_verdict(scene, name, results, flags.seeds) for scene in SCENES for name in SCENES[scene].metrics]
    picture = _draw(flags.output_dir, specs, results, flags.seeds[0])
    document = {"verdict": verdict, "provenance": provenance(command_line(PROG, argv))}
    write_atomic(flags.output_dir / "verdict.json", json_dump(document))
    if flags.json:
        print(json_dump(document).rstrip())
    else:
        print(_table(verdict, flags))
        print(f"weights over time: {picture or 'no run to draw'}")
        print(f"in {time.perf_counter() - started:.0f} s; everything: {flags.output_dir}")
    report_failures(rows)
    return 0


def _spec(flags: Flags, scene: str, arm: str, seed: int) -> Spec:
    config = SCENES[scene].config
    run = RunConfig(**{**vars(config), "mode": ARMS[arm], "seed": seed})
    return Spec(f"{scene}/{arm}", run, flags.output_dir / scene / arm / f"seed_{seed}")


def _verdict(
    scene: str, metric: str, results: Mapping[tuple[str, str, int], Result], seeds: Sequence[int]
) -> dict[str, Any]:
    """Means of both arms, and the paired difference (adaptive − fixed) over the seeds that finished in both."""
    adaptive, fixed = ([results[scene, arm, seed].get(metric) for seed in seeds] for arm in ("adaptive", "fixed"))
    pairs = [(a, f) for a, f in zip(adaptive, fixed, strict=True) if a is not None and f is not None]
    differences = [a - f for a, f in pairs]
    return {
        "task": SCENES[scene].title,
        "metric": f"test {SCENES[scene].metrics[metric]}",
        "seeds": len(pairs),
        "failed": sum(results[scene, arm, seed]["status"] != "ok" for arm in ARMS for seed in seeds),
        "fixed": statistics.fmean(f for _, f in pairs) if pairs else None,
        "adaptive": statistics.fmean(a for a, _ in pairs) if pairs else None,
        "difference": statistics.fmean(differences) if pairs else None,
        "interval95": bca_interval(differences) if pairs else None,
    }


def _table(verdict: Sequence[Mapping[str, Any]], flags: Flags) -> str:
    lines = [f"{'':<38}{'fixed':>9}{'adaptive':>10}{'difference':>12}  95% interval"]
    for before, entry in zip([None, *verdict], verdict, strict=False):
        if before is None or before["task"] != entry["task"]:
            lines.append(entry["task"])
        lines.append(f"  {entry['metric']:<36}{_numbers(entry)}")
    lines.append("same start weights, initialisation and order in both arms, paired by seed")
    if len(flags.seeds) < 5:
        lines.append("Warning: fewer than five seeds prove nothing; this shows the system at work, it is no evidence")
    return "\n".join(lines)


def _numbers(entry: Mapping[str, Any]) -> str:
    if entry["fixed"] is None:
        return "no seed finished in both arms"
    ends = entry["interval95"]
    interval = f"[{ends[0]:+.3f}, {ends[1]:+.3f}]" if ends else "none"
    return f"{entry['fixed']:>9.3f}{entry['adaptive']:>10.3f}{entry['difference']:>+12.3f}  {interval}"


def _draw(
    folder: Path,
    specs: Mapping[tuple[str, str, int], Spec],
    results: Mapping[tuple[str, str, int], Result],
    seed: int,
) -> Path | None:
    """The picture of the adaptive runs with ``seed`` that finished; None where none has."""
    from adaptive_loss.report.pictures import weights_picture

    drawn = [scene for scene in SCENES if results[scene, "adaptive", seed]["status"] == "ok"]
    curves = {SCENES[scene].title: _weights(specs[scene, "adaptive", seed].folder) for scene in drawn}
    if not curves:
        return None
    picture = folder / "weights.png"
    weights_picture(curves, picture, title="Loss weights, adapted while training (fixed weights would be flat lines)")
    return picture


def _weights(folder: Path) -> dict[str, list[float]]:
    """``step`` and the weight of every term, as the run's result exports them."""
    schedule = json.loads((folder / "result.json").read_text(encoding="utf-8"))["weights"]["schedule"]
    return {name: [point[name] for point in schedule] for name in schedule[0]}


if __name__ == "__main__":
    sys.exit(main())
