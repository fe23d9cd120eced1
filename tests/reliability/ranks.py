"""Several ranks on one machine: a job runs in a process a rank, over gloo, and is killed when its time is up."""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


class Hang(RuntimeError):
    """The ranks did not end in their time."""


def launch(job: str, size: int, seconds: float, **arguments: Any) -> list[Any]:
    """What ``job`` returned on each rank, by way of JSON.

    Args:
        job: ``"module:function"``, called on every rank with the arguments.
        size: number of ranks.
        seconds: after which all of them are killed.

    Raises:
        Hang: they did not end in time; with where each of them stood.
        RuntimeError: a rank failed; with the end of what each of them wrote.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ranks = [_start([job, str(rank), str(size), name, f"{seconds}"], arguments) for rank in range(size)]
        try:
            in_time = _wait(ranks, time.monotonic() + seconds)
        finally:
            for process in ranks:
                process.kill()
                process.wait()
        if not in_time or any(process.returncode for process in ranks):
            kind, what = (RuntimeError, "failed") if in_time else (Hang, f"did not end in {seconds:g} s")
            told = [(folder / f"{rank}.log").read_text(encoding="utf-8")[-3000:] for rank in range(size)]
            raise kind(f"{job} {what}\n" + "\n".join(f"rank {i}:\n{text}" for i, text in enumerate(told)))
        return [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(size)]


def _start(words: Sequence[str], arguments: dict[str, Any]) -> subprocess.Popen[bytes]:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-m", "tests.reliability.ranks", *words, json.dumps(arguments)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
    )


def _wait(ranks: Sequence[subprocess.Popen[bytes]], deadline: float) -> bool:
    """Whether all ended, or one failed, in time; the others, which would wait for it, then get a moment more."""
    failed = False
    while any(process.poll() is None for process in ranks):
        if time.monotonic() > deadline:
            return failed
        if not failed and any(process.returncode for process in ranks):
            failed, deadline = True, time.monotonic() + 2
        time.sleep(0.02)
    return True


def main(job: str, rank: str, size: str, folder: str, seconds: str, arguments: str) -> None:
    """One rank: what it writes goes into its log, and where it stands when its time is almost up."""
    with Path(folder, f"{rank}.log").open("wb") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    faulthandler.dump_traceback_later(max(float(seconds) - 5, 1))
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    limit = timedelta(seconds=float(seconds))  # one rank may wait long while another runs alone
    dist.init_process_group("gloo", f"file://{folder}/meet", timeout=limit, rank=int(rank), world_size=int(size))
    module, _, function = job.partition(":")
    found = getattr(importlib.import_module(module), function)(**json.loads(arguments))
    Path(folder, f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
