"""One small run of the real command, and what must hold of its folder whatever has happened to it."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.utils.tensorboard

from adaptive_loss.checkpoint import Checkpoints, load_file
from adaptive_loss.trainer import loop, train_task  # noqa: F401
from adaptive_loss.utils.logging import RunLogger
from tests.reliability import forks
from tests.reliability.bits import differences

FLAGS = shlex.split(
    "classify --mode full --subset 100 --batch-size 15 --epochs 2 --seed 7 --save-every 1 --threads 1 "
    "--device cpu --precision fp32"
)
LOGS = ("metrics.csv", "events.jsonl", "tb/scalars.jsonl")
TIMING = ("train_seconds", "steps_per_second", "peak_memory_mb", "provenance")


@dataclass
class Acknowledged:
    """What a run had said it had done before it ended."""

    saved: int = 0
    rows: dict[str, int] = field(default_factory=lambda: dict.fromkeys(LOGS, 0))


def command(folder: Path) -> int:
    """The command, to be run in a child; its exit code."""
    torch.set_num_threads(1)
    return train_task.main([*FLAGS, "--output-dir", str(folder)])


def run_folder(folder: Path) -> Path:
    """Where the command puts its run."""
    return folder / "full/seed_7"


def told(folder: Path, around: Callable[[], Any], log: Path) -> tuple[int, Acknowledged]:
    """Run the command in a child under the context ``around()``; its exit code, and what it had acknowledged."""
    reader, writer = os.pipe()

    def work() -> int:
        with _acknowledging(writer), around():
            return command(folder)

    pid = forks.start(work, log)
    os.close(writer)
    code = forks.wait(pid)
    with open(reader) as pipe:
        return code, _acknowledged(pipe.read().split())


@contextmanager
def _acknowledging(pipe: int) -> Iterator[None]:
    """Tell the parent of every checkpoint and every row, after the call that wrote it has come back."""
    save, append = Checkpoints.save, RunLogger._append

    def saving(self: Checkpoints, step: int, state: Any) -> None:
        save(self, step, state)
        os.write(pipe, f"saved {step}\n".encode())

    def appending(self: RunLogger, file: Any, line: str) -> None:
        append(self, file, line)
        os.write(pipe, f"{Path(file.name).relative_to(self.folder)} 1\n".encode())

    with mock.patch.object(Checkpoints, "save", saving), mock.patch.object(RunLogger, "_append", appending):
        yield


def _acknowledged(words: list[str]) -> Acknowledged:
    found = Acknowledged()
    for name, number in zip(words[::2], words[1::2], strict=False):
        if name == "saved":
            found.saved = int(number)
        else:
            found.rows[name] += 1
    return found


def left_wrong(folder: Path, whole: Path, acknowledged: Acknowledged) -> list[str]:
    """What is wrong with the folder of a run that ended early, beside the ``whole`` run's."""
    wrong = [f"{file.name} is torn" for file in folder.rglob("*.json") if not _is_json(file)]
    for name in LOGS:
        lines, wanted = _whole_lines(folder / name), _whole_lines(whole / name)
        if lines != wanted[: len(lines)]:
            wrong.append(f"{name} is not a beginning of the whole run's")
        if len(lines) < acknowledged.rows[name]:
            wrong.append(f"{name} has {len(lines)} lines, {acknowledged.rows[name]} were acknowledged")
    done = (folder / "result.json").exists()
    saved = None if done else Checkpoints(folder / "checkpoints").load()
    step = 0 if saved is None else saved["counters"]["step"]
    if not done and step < acknowledged.saved:
        wrong.append(f"step {acknowledged.saved} was acknowledged as saved, step {step} is there")
    return wrong


def ended_wrong(folder: Path, whole: Path) -> list[str]:
    """Where the finished run in ``folder`` is not the ``whole`` one to the last bit, timing apart."""
    wrong = [name for name in LOGS if (folder / name).read_bytes() != (whole / name).read_bytes()]
    states = [load_file(place / "checkpoint.pt") for place in (whole, folder)]
    results = [json.loads((place / "result.json").read_text(encoding="utf-8")) for place in (whole, folder)]
    for state, result in zip(states, results, strict=True):
        state["counters"].pop("seconds")
        for name in TIMING:
            result.pop(name)
    extra = sorted({file.name for file in folder.iterdir()} ^ {file.name for file in whole.iterdir()})
    wrong += [f"{', '.join(extra)} in one folder alone"] if extra else []
    return wrong + differences(states[0], states[1]) + differences(results[0], results[1])


def _is_json(file: Path) -> bool:
    try:
        json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return True


def _whole_lines(file: Path) -> list[str]:
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    return text[: text.rfind("\n") + 1].splitlines()
