"""Results on disk: one row a run, the same study as CSV and JSON, and where it came from.

Standard library only, so that reading results never imports torch.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import importlib.metadata
import io
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from adaptive_loss.errors import RunError, UsageError
from adaptive_loss.files import sync_folder
from adaptive_loss.trainer import simple_ablation_analysis as analysis

COLUMNS = analysis.COLUMNS
PACKAGES = ("adaptive-loss", "torch", "numpy", "torchjd", "gymnasium", "scipy", "optuna")
FORMULA = tuple("=+-@＝＋－＠")  # the wide forms are formulas to some spreadsheets too
_MODE = re.compile(r"[\w][\w.:/-]*")


@dataclasses.dataclass(frozen=True)
class Row:
    """One run of a study, in the columns of the results files.

    Args:
        mode: the arm's name: letters, digits and ``_ . : / -``, so that no spreadsheet reads it as a formula.
        seed: the run's seed.
        status: ``ok`` or ``failed: reason``; see :meth:`failed`.
        epochs, steps: what was trained.
        test_accuracy, select_accuracy: fractions from 0 to 1.
        test_loss: mean cross-entropy in nats.
        skipped_steps, interventions: how often a step was refused, and a weight was changed by a component.
        train_seconds: wall-clock time of training alone.
        metrics: what else is measured of the run on the test split, in columns of its own after the others.

    Raises:
        UsageError: a mode name or status that the files cannot hold.

    Example:
        >>> Row("full", 1, "ok", 30, 960, 0.75, 0.5, 0.5, 0, 12, 8.25).to_csv()
        ['full', '1', 'ok', '30', '960', '0.75', '0.5', '0.5', '0', '12', '8.25']
        >>> Row.failed("full", 2, "loss 'kl' is NaN at step 7").status
        "failed: loss 'kl' is NaN at step 7"
    """

    mode: str
    seed: int
    status: str = "ok"
    epochs: int | None = None
    steps: int | None = None
    test_accuracy: float | None = None
    test_loss: float | None = None
    select_accuracy: float | None = None
    skipped_steps: int | None = None
    interventions: int | None = None
    train_seconds: float | None = None
    metrics: Mapping[str, float | None] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not _MODE.fullmatch(self.mode):
            raise UsageError(f"mode name {self.mode!r}: use letters, digits and _ . : / - only")
        if self.status != "ok" and not self.status.startswith("failed: "):
            raise UsageError(f"status {self.status!r} of mode {self.mode}: use 'ok' or Row.failed(mode, seed, reason)")

    @classmethod
    def failed(cls, mode: str, seed: int, reason: object, **cells: Any) -> Row:
        """The row of a run that ended early; ``reason`` becomes one printable line."""
        return cls(mode, seed, f"failed: {analysis.printable(' '.join(str(reason).split()))}", **cells)

    @classmethod
    def of(cls, row: Row | Mapping[str, Any], metric: str | None = None) -> Row:
        """``row`` itself, or the row in a mapping; what is neither a column nor ``metric`` is left out."""
        if isinstance(row, Row):
            return row
        further = {} if metric is None or metric in COLUMNS else {metric: row.get(metric)}
        return cls(**{name: row[name] for name in COLUMNS if name in row}, metrics=further)

    @property
    def ok(self) -> bool:
        """Whether the run finished."""
        return self.status == "ok"

    def as_dict(self) -> dict[str, Any]:
        """The row as a dictionary in column order, the metrics of a failed run as ``None``."""
        measured = {"test_accuracy", "test_loss", "select_accuracy", *self.metrics}
        cells = {**{name: getattr(self, name) for name in COLUMNS}, **self.metrics}
        return {name: None if name in measured and not self.ok else value for name, value in cells.items()}

    def to_csv(self) -> list[str]:
        """The row's cells in column order."""
        return [csv_cell(value) for value in self.as_dict().values()]

    @classmethod
    def from_csv(cls, cells: Sequence[str]) -> Row:
        """The row behind ``cells``; ``ValueError`` names the cell that is damaged."""
        return cls(**analysis.parse_row(cells))


def csv_cell(value: object) -> str:
    """One CSV cell: floats by ``repr``, nothing for ``None`` and non-finite, text that cannot act as a formula.

    Example:
        >>> [csv_cell(value) for value in (0.1, float("nan"), None, 3, "=cmd", "a\\nb")]
        ['0.1', '', '', '3', "'=cmd", 'a\\\\nb']
    """
    if value is None:
        return ""
    if isinstance(value, str):
        text = analysis.printable(value)
        return f"'{text}" if text.lstrip()[:1] in FORMULA else text
    number = value.item() if hasattr(value, "item") else value  # type: ignore[union-attr]
    if isinstance(number, float):
        return repr(number) if math.isfinite(number) else ""
    return str(number)


def csv_line(cells: Iterable[object]) -> str:
    """One line of CSV, newline included."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow([csv_cell(cell) for cell in cells])
    return buffer.getvalue()


def json_ready(value: Any) -> Any:
    """``value`` as plain JSON types: non-finite numbers become ``None``, dataclasses dictionaries, paths text."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Row):
        return value.as_dict()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: json_ready(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): json_ready(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        items = sorted(value, key=repr) if isinstance(value, (set, frozenset)) else value
        return [json_ready(item) for item in items]
    if hasattr(value, "tolist"):  # numpy and torch, without importing either
        return json_ready(value.tolist())  # pyright: ignore[reportAttributeAccessIssue]
    return str(value)


def json_dump(value: Any, *, indent: int | None = 2) -> str:
    """``value`` as strict JSON text ending in a newline; numbers JSON cannot hold become ``null``.

    Example:
        >>> json_dump({"loss": float("inf"), "at": (1, 2)}, indent=None)
        '{"loss": null, "at": [1, 2]}\\n'
    """
    return json.dumps(json_ready(value), indent=indent, allow_nan=False) + "\n"


def write_atomic(path: str | Path, content: str | bytes) -> None:
    """Put ``content`` at ``path`` as a whole or not at all, even when killed in between.

    The bytes go to a new file in the same folder, are forced to disk and take the old file's name in one step. What a
    kill leaves of the new file is removed by :func:`remove_leftovers`.

    Raises:
        RunError: the folder cannot be made or written; the old file is as it was.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
        sync_folder(target.parent)
    except OSError as error:
        raise RunError(f"{target}: cannot be written ({error.strerror or error}); check space and rights") from error
    finally:
        with contextlib.suppress(OSError):  # gone after the replace, or its folder never was
            temporary.unlink()


def remove_leftovers(folder: Path, name: str = "*") -> None:
    """Remove what killed writers left of the files called ``name``; for their one writer, before it writes."""
    for file in folder.glob(f".{name}.*.tmp"):
        file.unlink(missing_ok=True)


def write_results(
    csv_path: str | Path,
    rows: Iterable[Row | Mapping[str, Any]],
    config: Any,
    pairs: Iterable[tuple[str, str]] = analysis.PAIRS,
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Write a study's csv and, beside it, the JSON of the same stem with its statistics.

    Args:
        csv_path: where the rows go, ``results/phase1_results.csv`` say.
        rows: the runs in any order, as :class:`Row` or as mappings with at least mode, seed and status.
        config: what was asked for. Rows are sorted by its ``modes``, if it has them, then by seed; runs are judged by
            its ``metric``, if it has one, else by accuracy or loss.
        pairs: the comparisons (a, b) wanted, as a − b; those whose modes did not run are left out.
        provenance: see :func:`provenance`.

    Raises:
        UsageError: a row the files cannot hold.
        RunError: the folder cannot be written.
    """
    config = json_ready(config)
    asked, judged = (config.get("modes"), config.get("metric")) if isinstance(config, dict) else (None, None)
    records = [Row.of(row, judged).as_dict() for row in rows]
    order = list(dict.fromkeys([*(asked or ()), *(record["mode"] for record in records)]))
    records.sort(key=lambda record: (order.index(record["mode"]), record["seed"]))
    metric = judged or analysis.metric_of(records)
    summary = analysis.summarise(records, metric)
    report = {
        "config": config,
        "rows": records,
        "summary": {mode: summary[mode] for mode in order if mode in summary},
        "comparisons": analysis.compare(records, pairs, metric),
        "provenance": provenance,
    }
    path = Path(csv_path)
    # The json goes first: by it a study knows its csv again, whatever a kill between the two leaves.
    write_atomic(path.with_suffix(".json"), json_dump(report))
    write_atomic(path, csv_text(records))


def holds(csv_path: Path, rows: Iterable[Row | Mapping[str, Any]], metric: str | None = None) -> bool:
    """Whether both results files of a study are whole and hold exactly these rows, in whatever order."""
    try:
        there = json.loads(csv_path.with_suffix(".json").read_text(encoding="utf-8"))["rows"]
        whole = csv_path.read_bytes() == csv_text(there).encode("utf-8")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    wanted = [json_ready(Row.of(row, metric)) for row in rows]
    return whole and len(there) == len(wanted) and all(row in there for row in wanted)


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """The content of a results csv; all rows have the columns of the first."""
    return "".join(csv_line(cells) for cells in (rows[0] if rows else COLUMNS, *(row.values() for row in rows)))


def read_results(csv_path: str | Path) -> list[Row]:
    """The rows of a results csv.

    Raises:
        RunError: the file is missing or damaged; the message names the line.
    """
    try:
        return [Row(**row) for row in analysis.read_rows(Path(csv_path))]
    except ValueError as error:
        raise RunError(str(error)) from error


def provenance(argv: Sequence[str], start: float | None = None) -> dict[str, Any]:
    """Where results come from: versions, source revision, machine, command line and time.

    Args:
        argv: the command line, kept as typed.
        start: ``time.time()`` when the command started; then ``seconds`` says how long it took.
    """
    now = time.time()
    return {
        "command": shlex.join(argv),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now if start is None else start)),
        "seconds": None if start is None else round(now - start, 3),
        "python": platform.python_version(),
        "packages": versions(),
        "git": _git(Path(__file__).resolve().parents[1]),
        "platform": platform.platform(),
        "cpu": {"model": _cpu_model(), "count": os.cpu_count()},
    }


def versions() -> dict[str, str | None]:
    """The versions of the packages that results hang on; None for one that is not installed."""
    return {name: _version(name) for name in PACKAGES}


@cache  # to read a package's metadata takes milliseconds, and every run tells its versions
def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(folder: Path) -> dict[str, Any] | None:
    """Revision of the checkout at ``folder`` and whether tracked files differ from it; ``None`` outside one."""
    if not (folder / ".git").exists():
        return None
    try:
        revision = _git_says(folder, "rev-parse", "HEAD")
        return {"revision": revision, "dirty": bool(_git_says(folder, "status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _git_says(folder: Path, *arguments: str) -> str:
    # no optional locks: asking for the state must not write the index under another git command's feet
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()


def _cpu_model() -> str:
    if sys.platform == "linux":
        try:
            found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
            if found:
                return found.group(1)
        except OSError:
            pass
    return platform.processor() or platform.machine()
