"""The ledger of a study: every row as it came, in an append-only file; the results files are derived from it.

Standard library only.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import NoneType, TracebackType
from typing import Any

from adaptive_loss.errors import RunError
from adaptive_loss.files import sync_folder
from adaptive_loss.locks import try_lock
from adaptive_loss.records import Row, json_dump, json_ready, remove_leftovers, write_results
from adaptive_loss.trainer import simple_ablation_analysis as analysis

FILE_NAME = "ledger.jsonl"
RESULTS = (analysis.FILE_NAME, "compare.csv")
"""What a study's results may be called within its folder."""
Record = dict[str, Any]


def line_of(record: Mapping[str, Any]) -> bytes:
    """``record`` as a line of the file: JSON with a checksum of everything else in it.

    Example:
        >>> line_of({"kind": "row", "seed": 1})
        b'{"check": "bf4e9728dfa499ba", "kind": "row", "seed": 1}\\n'
    """
    plain = json_ready(record)
    return json_dump({"check": _checksum(plain), **plain}, indent=None).encode("ascii")


def record_of(line: bytes) -> Record | None:
    """What :func:`line_of` was given; None for a line that is torn, altered or was never one."""
    try:
        record = json.loads(line)
        whole = record.pop("check") == _checksum(record) and line.endswith(b"\n")
        return record if whole and _is_sound(record) else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _is_sound(record: Record) -> bool:
    """Whether it says what such a record must: a file may come from anyone, and a checksum is easily made."""
    if not isinstance(record["at"], (int, float)):
        return False
    if record["kind"] == "study":
        config, pairs = record["config"], record["pairs"]
        lists = isinstance(config["modes"], list) and isinstance(config["seeds"], list)
        judged = (config.get("metric") or "test_").startswith("test_") and record.get("file", RESULTS[0]) in RESULTS
        return lists and judged and isinstance(record["provenance"], dict) and all(len(pair) == 2 for pair in pairs)
    cells = {**Row.of(record["row"]).as_dict(), **record["row"]}
    numbers = [value for name, value in cells.items() if name not in ("mode", "status")]
    return type(numbers[0]) is int and all(isinstance(value, (int, float, NoneType)) for value in numbers)


def _checksum(record: Mapping[str, Any]) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of the record in one exact form."""
    text = json.dumps(record, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:16]


class Ledger:
    """A study's ledger, opened by the one process that writes the study.

    A line that a kill tore off at the end is cut away, and told. What is appended is on disk when the call returns.

    Args:
        folder: the study's; made if it is not there.

    Raises:
        RunError: another process is at this study, the file is damaged before its end, or it cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with Ledger(folder) as ledger:
        ...         ledger.begin(Path(folder, "ablation_results.csv"), {"modes": ["full"], "seeds": [1]}, [], {})
        ...         ledger.add({"mode": "full", "seed": 1, "status": "failed: NaN"})
        ...     with Ledger(folder) as ledger:
        ...         [row["status"] for row in ledger.rows()]
        ['failed: NaN']
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.path = self.folder / FILE_NAME
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            new = not self.path.exists()
            self._file = self.path.open("ab", buffering=0)
            if new:
                sync_folder(self.folder)
        except OSError as error:
            raise RunError(f"{self.path}: cannot be written ({error.strerror}); choose another folder") from error
        if not try_lock(self._file):
            self._file.close()
            raise RunError(f"{self.folder} is in use by another process; wait for it or choose another output folder")
        try:
            self.records = self._repaired()
            self._pending: Record | None = None
        except BaseException:
            self._file.close()
            raise

    def begin(
        self, output: Path, config: Mapping[str, Any], pairs: Iterable[tuple[str, str]], provenance: Mapping[str, Any]
    ) -> None:
        """Say what the rows that follow belong to; it is written with the first of them.

        Args:
            output: the results csv: in the folder under one of :data:`RESULTS`, or beside it under the folder's name.
            config: the configuration that the results file records, with its ``modes`` and ``seeds``; its ``metric``,
                if it has one, is what the runs are judged by.
            pairs: the comparisons wanted.
            provenance: see :func:`adaptive_loss.records.provenance`.
        """
        heading = {"config": config, "pairs": [list(pair) for pair in pairs], "provenance": provenance}
        place = {"inside": True, "file": output.name} if output.parent == self.folder else {"inside": False}
        self._pending = {"kind": "study", **place, **heading}
        for file in (output, output.with_suffix(".json")):
            remove_leftovers(file.parent, file.name)

    def add(self, row: Row | Mapping[str, Any]) -> None:
        """Append the row of a run that ended, whichever way; one that stands there already is left."""
        plain = json_ready(Row.of(row, (self._pending or self._heading())["config"].get("metric")))
        if plain in self.rows():
            return
        record = {"kind": "row", "row": plain}
        if not _is_sound({"at": 0.0, **record}):
            run = f"{plain['mode']} seed {plain['seed']}"
            raise RunError(f"{self.folder}: the result of {run} holds what is no number; remove that run's folder")
        if self._pending is not None:
            self._append(self._pending)
            self._pending = None
        self._append(record)

    def rows(self) -> list[Record]:
        """The last row of every mode and seed."""
        last = {(r["row"]["mode"], r["row"]["seed"]): r["row"] for r in self.records if r["kind"] == "row"}
        return list(last.values())

    @property
    def output(self) -> Path:
        """The results csv of the study."""
        if self._heading()["inside"]:
            return self.folder / self._heading().get("file", RESULTS[0])
        folder = self.folder.absolute()
        return folder.with_name(f"{folder.name}.csv")

    def write_results(self) -> None:
        """Replace the study's results files, :attr:`output` and the .json of the same stem, by what the ledger says.

        Raises:
            RunError: it says nothing yet, or they cannot be written.
        """
        heading = self._heading()
        modes, seeds = heading["config"]["modes"], heading["config"]["seeds"]
        rows = [row for row in self.rows() if row["mode"] in modes and row["seed"] in seeds]
        seconds = round(self.records[-1]["at"] - heading["at"], 3)
        pairs = [(a, b) for a, b in heading["pairs"]]
        write_results(self.output, rows, heading["config"], pairs, heading["provenance"] | {"seconds": seconds})

    def _heading(self) -> Record:
        for record in reversed(self.records):
            if record["kind"] == "study":
                return record
        raise RunError(f"{self.path} holds no study yet; run its command again")

    def _append(self, record: Record) -> None:
        record = json_ready({"at": round(time.time(), 3), **record})
        line = line_of(record)
        size = os.fstat(self._file.fileno()).st_size
        try:
            whole = self._file.write(line) == len(line)
            os.fsync(self._file.fileno())
        except OSError as error:
            self._cut(size)
            raise RunError(f"{self.path}: cannot be written ({error.strerror}); check the disk's space") from error
        if not whole:
            self._cut(size)
            raise RunError(f"{self.path}: only part of a line could be written; check the disk's space")
        self.records.append(record)

    def _cut(self, size: int) -> None:
        with contextlib.suppress(OSError):  # else the next opening does it
            os.ftruncate(self._file.fileno(), size)

    def _repaired(self) -> list[Record]:
        """The file's records, after a torn end was cut away."""
        lines = self.path.read_bytes().splitlines(keepends=True)
        records = [record_of(line) for line in lines]
        while records and records[-1] is None:
            records.pop()
        if None in records:
            raise RunError(
                f"{self.path}: line {records.index(None) + 1} is damaged; move the file away, "
                "and the study's command makes a new one from the runs that are done"
            )
        torn = sum(map(len, lines[len(records) :]))
        if torn:
            print(f"{self.path}: cut off {torn} bytes of a line that was never finished", file=sys.stderr)
            self._cut(sum(map(len, lines[: len(records)])))
        return [record for record in records if record is not None]

    def close(self) -> None:
        """Let others write the study."""
        self._file.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
