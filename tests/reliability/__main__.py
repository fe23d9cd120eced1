"""``make torture``: every promise of reliability, tried many times, a line each.

python -m tests.reliability [MODULE ...] [--quick] [--write]
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from adaptive_loss.records import provenance, write_atomic
from tests.reliability.rows import Row

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
TABLE = ROOT / "docs" / "reliability.md"
AT_A_TIME = 2
QUICK = 10
"""``--quick`` divides the trials by this."""
LIMIT_S = 45 * 60
"""Seconds for one module, which then hangs; the longest takes about half of it, on an idle machine."""
FIRST = ("exact_resume", "parallel")
"""The longest begin first, so that at the end none is left alone for long."""


def find(folder: Path = FOLDER) -> list[str]:
    """The modules of ``folder`` that define ``torture()``, found without importing them."""
    found = [file.stem for file in sorted(folder.glob("*.py")) if _has_torture(file)]
    return sorted(found, key=lambda name: name not in FIRST)


def _has_torture(file: Path) -> bool:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return any(isinstance(node, ast.FunctionDef) and node.name == "torture" for node in tree.body)


def run(module: str, divisor: int = 1, limit_s: float = LIMIT_S) -> list[Row]:
    """The rows of one module, run in a process of its own; a module that fails or takes too long is a failed row.

    Args:
        module: its full dotted name.
        divisor: of its trials.
        limit_s: seconds after which it is killed with everything that it started.
    """
    name = module.rpartition(".")[2]
    with tempfile.TemporaryDirectory() as folder:
        rows, said = Path(folder, "rows.json"), Path(folder, "said.txt")
        command = [sys.executable, "-m", "tests.reliability.one", module, str(rows), str(divisor)]
        with said.open("wb") as output:
            process = subprocess.Popen(
                command, cwd=ROOT, env=_environment(), stdout=output, stderr=output, start_new_session=True
            )
            try:
                code = process.wait(limit_s)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                return [Row(name, 1, 1, f"not done within {limit_s:g} s")]
        if code != 0 or not rows.exists():
            lines = said.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            return [Row(name, 1, 1, f"exit code {code}: {lines[-1] if lines else 'it said nothing'}")]
        return [Row(**row) for row in json.loads(rows.read_text(encoding="utf-8"))]


def _environment() -> dict[str, str]:
    """One thread a process, and the helpers of the tests beside this checkout's package."""
    paths = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def run_all(modules: Sequence[str], tell: Callable[[Row], None], divisor: int = 1) -> list[Row]:
    """The rows of all modules in their order; each row is told as soon as its module is done."""

    def one(module: str) -> list[Row]:
        rows = run(module, divisor)
        for row in rows:
            tell(row)
        return rows

    with ThreadPoolExecutor(AT_A_TIME) as pool:
        return [row for rows in pool.map(one, modules) for row in rows]


def line(row: Row) -> str:
    """A row as one line of plain text."""
    mark = "ok  " if row.failures == 0 else "FAIL"
    return f"{mark} {row.promise}: {row.trials} trials, {row.failures} failures{f' ({row.note})' if row.note else ''}"


def table(rows: Sequence[Row], command: str, minutes: float) -> str:
    """The page that says what was tried, when, on what machine and by which command."""
    said = provenance([])
    machine = f"{said['cpu']['model']}, {len(os.sched_getaffinity(0))} cores, Python {said['python']}"
    lines = [
        "# What has been tried",
        "",
        f"Made by `{command}` on {said['started'][:10]} in {minutes:.0f} minutes; {machine}, "
        f"torch {said['packages']['torch']}. What is promised is in [SECURITY.md](../SECURITY.md) and the README.",
        "",
        "| promise | trials | failures | note |",
        "|---|---:|---:|---|",
    ]
    lines += [f"| {_cell(row.promise)} | {row.trials:,} | {row.failures} | {_cell(row.note)} |" for row in rows]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; 1 if anything failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.reliability", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("modules", nargs="*", metavar="MODULE", help=f"of {', '.join(find())}; all if none is named")
    parser.add_argument("--quick", action="store_true", help=f"a {QUICK}th of the trials")
    parser.add_argument("--write", action="store_true", help="write docs/reliability.md; needs all modules")
    options = parser.parse_args(argv)
    if options.write and options.modules:
        parser.error("--write needs all modules; name none")
    started = time.monotonic()
    names = options.modules or find()
    modules, divisor = [f"tests.reliability.{name}" for name in names], QUICK if options.quick else 1
    rows = run_all(modules, lambda row: print(line(row), flush=True), divisor)
    if options.write:
        command = f"python -m tests.reliability{' --quick' if options.quick else ''} --write"
        write_atomic(TABLE, table(rows, command, (time.monotonic() - started) / 60))
    failed = sum(row.failures > 0 for row in rows)
    print(f"{len(rows)} promises, {failed} failed, {(time.monotonic() - started) / 60:.1f} minutes")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
