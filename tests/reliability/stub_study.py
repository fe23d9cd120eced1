"""A study whose runs take no time but write what real ones do, in a forked process that can be killed anywhere."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

from adaptive_loss import records, trainer
from adaptive_loss.records import json_dump, write_atomic
from adaptive_loss.trainer import run_ablation_study, single, study
from adaptive_loss.utils.config import RunConfig, to_json
from adaptive_loss.utils.logging import RunLogger

TOUCHING = {"open", "write", "flush", "fsync", "replace", "rename", "unlink", "ftruncate", "mkdir", "close", "flock"}
"""The names of the calls that reach the disk; a kill falls just before one of them."""
TRAININGS = "trainings.txt"
STEPS = (1, 2)


def train(config: RunConfig, folder: Path, *, quiet: bool) -> dict[str, Any]:
    """Stands for ``trainer.loop.run``: the same files in the same order, and a line in the study's trainings.txt."""
    write_atomic(folder / "config.json", json_dump(to_json(config)))
    for stale in ("metrics.csv", "events.jsonl", "tb/scalars.jsonl"):
        (folder / stale).unlink(missing_ok=True)
    with RunLogger(folder, tensorboard=False) as log:
        for step in STEPS:
            log.event(step, "action", "up")
            log.epoch({"epoch": step, "step": step, "process": os.getpid()})
    row = dict.fromkeys(records.COLUMNS, 0) | {"mode": config.mode, "seed": config.seed, "status": "ok"}
    row |= {"test_accuracy": 0.5 + config.seed / 1000, "test_loss": 1 / 3, "select_accuracy": 0.5}
    write_atomic(folder / "checkpoint.pt", os.getpid().to_bytes(8, "big") * 4096)
    write_atomic(folder / "result.json", json_dump({**row, "process": os.getpid()}))
    with (folder.parents[1] / TRAININGS).open("a") as file:
        file.write(f"{config.mode} {config.seed}\n")
    return row


def stubbed() -> None:
    """From now on this process trains by :func:`train` and loads no data."""
    loop = ModuleType("adaptive_loss.trainer.loop")
    loop.run = train  # type: ignore[attr-defined]
    # Where another test has imported the real one, the package has it as an attribute too.
    sys.modules["adaptive_loss.trainer.loop"] = trainer.loop = loop  # type: ignore[attr-defined]
    study.prepare = single.prepare = lambda settings: None


def ablate(folder: Path, seeds: tuple[int, ...] = (1, 2), modes: tuple[str, ...] = ("baseline", "full")) -> int:
    """The real command over stubbed runs; its exit code. For a forked process."""
    stubbed()
    argv = ["--output_dir", str(folder), "--jobs", "1", "--seeds", *map(str, seeds), "--modes", *modes]
    return run_ablation_study.main(argv)


def forked(work: Callable[[], int], said: Path) -> int:
    """Start ``work`` in a forked process whose output is added to the file ``said``; its process number."""
    said.touch()  # one that is killed at once has not made it yet
    process = os.fork()
    if process:
        return process
    code = 99
    try:
        handle = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        sys.stdout = sys.stderr = open(handle, "w", buffering=1)  # noqa: SIM115 - not pytest's
        code = work()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def ended(process: int) -> int:
    """Wait for a forked process; its exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def counting(work: Callable[[], int], kill_at: int | None = None, tell: Callable[[int], None] | None = None) -> int:
    """Do ``work``, counting the calls that reach the disk, and kill this process just before the ``kill_at``-th."""
    count = 0

    def watch(frame: FrameType | None, event: str, call: Any) -> None:
        nonlocal count
        if event == "c_call" and getattr(call, "__name__", "") in TOUCHING and not _only_reads(frame):
            count += 1
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(watch)
    try:
        return work()
    finally:
        sys.setprofile(None)
        if tell is not None:
            tell(count)


def _only_reads(frame: FrameType | None) -> bool:
    """Whether the call comes from what asks for versions or parses flags, which opens hundreds of files to read."""
    while frame is not None:
        if frame.f_code.co_name in ("provenance", "parse", "_find_and_load"):
            return True
        frame = frame.f_back
    return False
