"""Children of one imported process: each starts from the same memory, and costs no import."""

from __future__ import annotations

import gc
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path


def start(work: Callable[[], int | None], log: Path) -> int:
    """Do ``work`` in a child, whose exit code it gives (None is 0) and whose output goes to ``log``; the child's id."""
    log.touch()  # a child may be killed before it can open it
    gc.freeze()  # what is imported is not searched for garbage again and again in the children
    pid = os.fork()
    if pid:
        gc.unfreeze()
        return pid
    code = 70
    with open(log, "a", encoding="utf-8") as said:
        for stream in (1, 2):
            os.dup2(said.fileno(), stream)
        sys.stdout = sys.stderr = said
        try:
            code = work() or 0
        except BaseException:
            traceback.print_exc()
        finally:
            said.flush()
            os._exit(code)


def wait(pid: int, seconds: float = 120.0) -> int:
    """The child's exit code, or minus the signal that ended it; it is killed when the time is up."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    raise TimeoutError(f"a child was still running after {seconds:g} s")


def call(work: Callable[[], int | None], log: Path) -> int:
    """Do ``work`` in a child and wait for it; its exit code, or minus the signal that ended it."""
    return wait(start(work, log))
