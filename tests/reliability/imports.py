"""Importing is safe: no module of the package opens a socket, writes a file or starts a process when it is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.reliability.rows import Row

ROOT = Path(__file__).parents[2]
CODE = """
import importlib, json, os, sys
did, (before, names) = [], json.loads(sys.argv[1])
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC
BAD = ("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.sendto",
       "subprocess.Popen", "os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn",
       "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.symlink", "os.link", "os.chmod",
       "shutil.", "tempfile.")
def watch(event, args):
    if event == "open" and (args[2] or 0) & WRITING and str(args[0]) != os.devnull:
        did.append(f"open {args[0]} for writing")
    elif event.startswith(BAD):
        did.append(f"{event} {args!r:.80}")
for name in before:
    importlib.import_module(name)
for name in names:
    if child := os.fork():
        os.waitpid(child, 0)
        continue
    sys.addaudithook(watch)
    try:
        importlib.import_module(name)
    except BaseException as error:
        did.append(f"cannot be imported: {error!r}")
    os.write(1, (json.dumps([name, did]) + "\\n").encode())
    os._exit(0)
"""
OTHERS = ("torch", "torch._dynamo", "numpy")
"""Imported before the watch begins: what they do is not the package's doing. torch's compiler makes a cache folder."""


def torture() -> Row:
    """Every module of the package, each in a process that has imported nothing else of it."""
    return watched(modules())


def modules() -> list[str]:
    """Every module but ``__main__``, which is the command."""
    files = sorted((ROOT / "adaptive_loss").rglob("*.py"))
    names = [".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in files]
    return [name for name in names if not name.endswith("__main__")]


def watched(names: list[str]) -> Row:
    """Import each of ``names`` under watch."""
    found = did(names, OTHERS)
    faults = [f"{name}: {what}" for name in names for what in found.get(name, ["ended the process"])]
    return Row(
        "importing is safe: 0 sockets, processes, files written", len(names), len(faults), "; ".join(faults)[:300]
    )


def did(names: list[str], before: tuple[str, ...] = ()) -> dict[str, list[str]]:
    """What importing each of ``names`` does to the world, ``before`` having been imported already."""
    command = [sys.executable, "-B", "-c", CODE, json.dumps([before, names])]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return dict(map(json.loads, done.stdout.splitlines()))
