"""Exact resume: a run that is cut anywhere goes on as if it had not been, to the last bit.

    python -m tests.reliability.exact_resume

Every weighting rule, 50 cuts each, drawn from {in an epoch, at its edge, just after a skipped step} × loader workers
{0, 2}. The run that goes on is a child forked from this process, which has trained nothing; it finds the logs as a kill
after the whole run would have left them. Parameters, optimizer, schedule, scaler, generators, weights, controller,
monitor with replay, rows and events must come out as in the run that was not cut.
"""

from __future__ import annotations

import random
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from adaptive_loss.checkpoint import load_file, save_file
from adaptive_loss.weighting import TORCHJD, weightings
from tests.reliability import forks
from tests.reliability.bits import differences
from tests.reliability.rows import Row
from tests.reliability.small_run import EDGES, SKIPPED, STEPS, Setting, SmallRun

RULES = (*weightings.names(), *TORCHJD)
CUTS = 50
SEEDS = 5
LOGS = ("metrics.csv", "events.jsonl")
KINDS: dict[str, tuple[int, ...]] = {
    "in an epoch": tuple(step for step in range(1, STEPS) if step not in (*EDGES, *SKIPPED)),
    "at an epoch's edge": EDGES,
    "after a skip": SKIPPED,
}


def whole(setting: Setting, folder: Path) -> None:
    """The run without a cut, which leaves its state after every step and at its end."""
    run = SmallRun(setting, folder)

    def keep() -> None:
        assert run.skipped_last == (run.step in SKIPPED), f"step {run.step}"
        save_file(folder / f"{run.step}.pt", run.state())

    run.train(keep)


def resumed(setting: Setting, folder: Path, cut: int, place: Path) -> list[str]:
    """Where the run that goes on, in ``place``, from step ``cut`` of the one in ``folder`` comes out otherwise."""
    place.mkdir()
    for name in LOGS:
        shutil.copy(folder / name, place / name)
    run, last = SmallRun(setting, place), {}
    run.go_on(load_file(folder / f"{cut}.pt"))
    run.train(lambda: last.update(run.state()))
    found = differences(load_file(folder / f"{STEPS}.pt"), last)
    return found + [name for name in LOGS if (folder / name).read_bytes() != (place / name).read_bytes()]


def torture(rules: Sequence[str] = RULES, cuts: int = CUTS) -> Row:
    """Cut and resume every rule."""
    torch.set_num_threads(1)
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        for rule in rules:
            bad = _rule(rule, cuts, Path(folder) / rule)
            failed += bad
            print(f"  {rule}: {cuts - len(bad)} of {cuts}", file=sys.stderr, flush=True)
    note = f"{len(rules)} rules, {cuts} cuts each" + "".join(f"; {line}" for line in failed[:3])
    return Row("exact resume", len(rules) * cuts, len(failed), note)


def _rule(rule: str, cuts: int, folder: Path) -> list[str]:
    """Every cut of one rule that came out otherwise."""
    folder.mkdir()
    dice, log, failed = random.Random(rule), folder / "log", []
    for seed in range(SEEDS):
        settings = {workers: Setting(rule, seed, workers) for workers in (0, 2)}
        for workers, setting in settings.items():
            code = forks.call(lambda s=setting, w=workers: whole(s, folder / f"{s.seed}_{w}"), log)
            assert code == 0, f"{rule} cannot be trained: {log.read_text()}"
        for _ in range(cuts // SEEDS):
            workers, kind = dice.choice((0, 2)), dice.choice(tuple(KINDS))
            cut, source = dice.choice(KINDS[kind]), folder / f"{seed}_{workers}"
            code = forks.call(lambda s=settings[workers], c=cut, f=source: _child(s, f, c, folder / "again"), log)
            shutil.rmtree(folder / "again", ignore_errors=True)
            if code:
                failed.append(f"{rule}, {workers} workers, cut {kind} at step {cut}: {log.read_text()[-300:]}")
    return failed


def _child(setting: Setting, folder: Path, cut: int, place: Path) -> int:
    found = resumed(setting, folder, cut, place)
    print("\n".join(found))
    return 1 if found else 0


if __name__ == "__main__":
    print(torture(sys.argv[1:] or RULES))
