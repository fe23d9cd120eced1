"""What the gate behind the monitor holds off: a monitor that means harm, with the gate and without it.

    python -m benchmarks.gate

Every run is `adaptive-loss train TASK --quick`; runs that are done are not done again. The harm is done by the
package's monitor with the sign of its values turned, at full strength, above the controller or alone: it takes the
action that its networks are sure does the most harm, as far as its residual reaches, a factor of four either way a
term.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from adaptive_loss import LossMonitor, MetaController
from adaptive_loss.events import Event
from adaptive_loss.modes.base import Mode
from adaptive_loss.modulator import Modulator
from adaptive_loss.policy_files import POLICIES, read_policy
from adaptive_loss.tasks import tasks
from adaptive_loss.trainer.simple_ablation_analysis import paired
from adaptive_loss.utils.commands import command, parse
from adaptive_loss.utils.config import RunConfig
from adaptive_loss.weighting.base import Context
from benchmarks import arms as study

PROG = "python -m benchmarks.gate"
MODES = {
    "controller": "controller_only",
    "hostile above it, gate": "benchmarks.gate:above_gated",
    "hostile above it, no gate": "benchmarks.gate:above_ungated",
    "held": "baseline",
    "hostile alone, gate": "benchmarks.gate:alone_gated",
    "hostile alone, no gate": "benchmarks.gate:alone_ungated",
}
RIVALS = {arm: "controller" if "above" in arm else "held" for arm in MODES if arm.startswith("hostile")}
OUTPUT_LAYERS = ("common_out", "move_out")
COLUMNS: study.Columns = {
    "loss": study.column("loss"),
    "rho": lambda row: row["monitor"]["rho"] if row.get("monitor") else float("nan"),
}


class Ungated(LossMonitor):
    """A monitor whose gate is shown nothing, and so stays open."""

    def end_epoch(self, context: Context, metrics: Mapping[str, float]) -> list[Event]:
        """Nothing is told of the epoch."""
        return super().end_epoch(context, {})


def turned(networks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The networks whose values are −Q."""
    return {name: -part if name.startswith(OUTPUT_LAYERS) else part for name, part in networks.items()}


def hostile(kind: type[LossMonitor], above: bool) -> Mode:
    """The policy's monitor turned, above its controller or alone."""

    def modulators(policy: Path | None) -> tuple[Modulator, ...]:
        _, networks = read_policy(policy or POLICIES, "monitor")
        monitor = kind(rho=1.0, network=turned(networks))
        return (MetaController.from_policy(policy), monitor) if above else (monitor,)

    return Mode(modulators)


def above_gated() -> Mode:
    """The hostile monitor as every monitor runs."""
    return hostile(LossMonitor, above=True)


def above_ungated() -> Mode:
    """The hostile monitor, and nothing that stops it but the controller."""
    return hostile(Ungated, above=True)


def alone_gated() -> Mode:
    """The hostile monitor, and no controller that makes good what it does."""
    return hostile(LossMonitor, above=False)


def alone_ungated() -> Mode:
    """The hostile monitor, and nothing that stops it."""
    return hostile(Ungated, above=False)


@dataclass(frozen=True, kw_only=True)
class Flags(study.Flags):
    """The flags of the benchmark."""

    tasks: tuple[str, ...] = ("multitask", "vae", "distill")
    """Tasks with a select split to watch, and epochs enough for a forecast."""
    seeds: tuple[int, ...] = tuple(range(1, 11))
    """Seeds; every arm runs each of them, paired."""
    output_dir: Path = Path("results/gate")
    """Where the runs, table.csv and table.json go."""


def arms(flags: Flags) -> dict[str, RunConfig]:
    """By name, the runs to compare, their seed still open."""
    return {f"{task}: {arm}": _config(task, mode, flags) for task in flags.tasks for arm, mode in MODES.items()}


def _config(task: str, mode: str, flags: Flags) -> RunConfig:
    kind = tasks.get(task)
    common: dict[str, Any] = {"dataset": kind.datasets[0], "data_dir": flags.data_dir, **kind.quick}
    return RunConfig(task=task, mode=mode, weights=dict(kind.customary), **common)


def verdicts(rows: Sequence[Mapping[str, Any]], task: str) -> list[str]:
    """What the hostile monitor costs with the gate and without, in test loss, and how often the gate closed."""
    own = {arm: [row for row in rows if row["arm"] == f"{task}: {arm}"] for arm in MODES}
    return [f"{task}: {arm}: {_verdict(own[arm], own[rival])} over {rival}" for arm, rival in RIVALS.items()]


def _verdict(rows: Sequence[Mapping[str, Any]], rival: Sequence[Mapping[str, Any]]) -> str:
    closed = sum(row["status"] == "ok" and row["rho"] < 1 for row in rows)
    found = paired(rows, rival, "loss")
    ends, difference = found["interval95"], found["difference"]
    between = f" [{ends[0]:+.4g}, {ends[1]:+.4g}]" if ends else ""
    shown = "-" if difference is None else f"{difference:+.4g}"
    return f"the gate closed in {closed} of {len(rows)} runs; loss {shown}{between}"


@command
def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    flags = parse(Flags, argv, PROG, "A monitor that means harm, with the gate behind it and without.")
    rows = study.conduct(PROG, argv, flags, arms(flags), COLUMNS, rivals=())
    print(*(line for task in flags.tasks for line in verdicts(rows, task)), sep="\n")
    return study.exit_code(rows)


if __name__ == "__main__":
    sys.exit(main())
