"""What a run says while it runs: metrics as CSV, events and curves as JSON lines, one progress line.

The CSV and the JSON lines are the truth; the TensorBoard files are a view of ``tb/scalars.jsonl`` beside them, and
``adaptive-loss rebuild`` makes them anew.
"""

from __future__ import annotations

import csv
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Protocol

from adaptive_loss.errors import RunError, UsageError
from adaptive_loss.records import csv_cell, csv_line, json_dump, write_atomic
from adaptive_loss.trainer.simple_ablation_analysis import printable
from adaptive_loss.utils.pictures import png

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

INTERVAL_S = 10.0
SCALARS = "tb/scalars.jsonl"
PICTURES = "pictures"


class RunLogger:
    """Writes a run's ``metrics.csv``, ``events.jsonl`` and the curves in ``tb/`` into one folder, each line at once.

    An existing folder is continued: a line torn by a kill is cut off, and the metrics keep their columns.

    Args:
        folder: made if it is not there.
        columns: the columns of ``metrics.csv``; without them the first row's keys.
        tensorboard: also write TensorBoard files. If TensorBoard is not installed, one line says how to get it.

    Raises:
        RunError: the folder cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with RunLogger(folder, tensorboard=False) as log:
        ...         log.epoch({"epoch": 1, "loss": 0.5})
        ...         log.event(10, "skip", "loss 'kl' is NaN", term="kl")
        ...     (Path(folder) / "metrics.csv").read_text()
        'epoch,loss\\n1,0.5\\n'
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        columns: Sequence[str] | None = None,
        tensorboard: bool = True,
    ) -> None:
        self.folder = Path(folder)
        self._tensorboard = tensorboard
        self._pictures = True
        self._last_curve = -1
        self._synced: dict[str, int] = {}
        self._purge_step: int | None = None
        self._writer: Any = None
        try:
            (self.folder / SCALARS).parent.mkdir(parents=True, exist_ok=True)
            for name in ("metrics.csv", "events.jsonl", SCALARS):
                _cut_torn_line(self.folder / name)
            self._columns = self._header()
            # unbuffered: a line is on disk or refused, and nothing is left over to fail again at close
            self._metrics = open(self.folder / "metrics.csv", "ab", buffering=0)  # noqa: SIM115
            self._events = open(self.folder / "events.jsonl", "ab", buffering=0)  # noqa: SIM115
            self._scalars = open(self.folder / SCALARS, "ab", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise RunError(f"{self.folder}: cannot be written ({error.strerror}); choose another folder") from error
        if columns is not None and self._columns is None:
            self._start(columns)

    def epoch(self, row: Mapping[str, float | int | str | None]) -> None:
        """Append one row to ``metrics.csv``; keys that are absent and non-finite values leave an empty cell.

        Raises:
            UsageError: a key that the file has no column for.
        """
        columns = self._columns or self._start(list(row))
        unknown = [name for name in row if csv_cell(name) not in columns]
        if unknown:
            raise UsageError(f"{self.folder / 'metrics.csv'} has no column {unknown[0]!r}; name it in columns=")
        cells = {csv_cell(name): value for name, value in row.items()}
        self._append(self._metrics, csv_line(cells.get(name) for name in columns))

    def event(self, step: int, kind: str, reason: str, **details: Any) -> None:
        """Append one line to ``events.jsonl``: what happened (skip, clamp, action, controller, raise …) and why."""
        line = json_dump({"step": step, "kind": kind, "reason": reason, **details}, indent=None)
        self._append(self._events, line)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Append the finite ones of ``values`` at ``step`` to ``tb/scalars.jsonl``, and show them in TensorBoard."""
        finite = {tag: float(value) for tag, value in values.items() if math.isfinite(value)}
        self._append(self._scalars, json_dump({"step": step, "values": finite}, indent=None))
        self._last_curve = step
        if self._open():
            for tag, value in finite.items():
                self._writer.add_scalar(tag, value, step)

    def picture(self, step: int, name: str, image: NDArray[np.uint8]) -> None:
        """Write ``image``, [H, W, 3], to ``pictures/<name>_<step>.png``, and show it in TensorBoard.

        If matplotlib is not installed, one line says how to get it.
        """
        try:
            content = png(image)
        except ImportError:
            if self._pictures:
                print("no pictures; to have them: pip install 'adaptive-loss[report]'", file=sys.stderr)
            self._pictures = False
            return
        write_atomic(self.folder / PICTURES / f"{name}_{step:06d}.png", content)
        if self._open():
            self._writer.add_image(name, image, step, dataformats="HWC")
        self._last_curve = max(self._last_curve, step)

    def state_dict(self) -> dict[str, int]:
        """How far each file has come, all of it forced to disk: a run that goes on from here drops what came later."""
        if self._writer is not None:
            self._writer.flush()
        sizes = {name: os.fstat(file.fileno()).st_size for name, file in self._files()}
        for name, file in self._files():
            if sizes[name] != self._synced.get(name):  # forcing costs milliseconds, and most steps write no row
                _force(file)
        self._synced = sizes
        return {**sizes, "last_curve": self._last_curve}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Cut the files back to where :meth:`state_dict` found them; TensorBoard is told to hide later curves.

        Raises:
            RunError: a file has lost what it held then.
        """
        for name, file in self._files():
            if os.fstat(file.fileno()).st_size < state[name]:
                raise RunError(f"{file.name} is shorter than when the run was saved; begin anew with --no-resume")
            file.truncate(state[name])
        self._columns = self._header()
        self._last_curve = state["last_curve"]
        self._purge_step = self._last_curve + 1

    def close(self) -> None:
        """Flush and close every file; a second call does nothing."""
        self._metrics.close()
        self._events.close()
        self._scalars.close()
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        self._tensorboard = False

    def __enter__(self) -> RunLogger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _files(self) -> list[tuple[str, FileIO]]:
        return [("metrics", self._metrics), ("events", self._events), ("scalars", self._scalars)]

    def _start(self, columns: Sequence[str]) -> list[str]:
        self._columns = [csv_cell(name) for name in columns]
        self._append(self._metrics, csv_line(columns))
        return self._columns

    def _append(self, file: FileIO, line: str) -> None:
        content = line.encode("utf-8")
        try:
            whole = file.write(content) == len(content)
        except OSError as error:
            raise RunError(f"{file.name}: cannot be written ({error.strerror}); check the disk's space") from error
        if not whole:
            raise RunError(f"{file.name}: only part of a line could be written; check the disk's space")

    def _header(self) -> list[str] | None:
        path = self.folder / "metrics.csv"
        if not path.exists():
            return None
        with path.open(encoding="utf-8", newline="") as file:
            return next(csv.reader(file), None)

    def _open(self) -> bool:
        """Whether there is TensorBoard to write to."""
        if self._writer is None and self._tensorboard:
            self._writer = self._open_tensorboard()
            self._tensorboard = self._writer is not None
        return self._writer is not None

    def _open_tensorboard(self) -> Any:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            print("no TensorBoard curves; to have them: pip install tensorboard", file=sys.stderr)
            return None
        return SummaryWriter(str(self.folder / "tb"), purge_step=self._purge_step)


def _force(file: FileIO) -> None:
    try:
        os.fsync(file.fileno())
    except OSError as error:
        raise RunError(f"{file.name}: cannot be written ({error.strerror}); check the disk's space") from error


def _cut_torn_line(path: Path) -> None:
    """Cut off a last line that a kill has torn."""
    content = path.read_bytes() if path.exists() else b""
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        write_atomic(path, whole)


class Progress(Protocol):
    """What :func:`progress` yields."""

    def update(self, n: int = 1, text: str = "") -> None:
        """Count ``n`` more steps done; ``text`` (the loss, say) stands beside the bar."""


@contextmanager
def progress(
    total: int,
    description: str,
    *,
    stream: IO[str] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Progress]:
    """Show how far ``total`` steps have come: a bar on a terminal, elsewhere a plain line at most every 10 s.

    It writes to standard error unless told another ``stream``, so that results on standard output stay clean.

    Example:
        >>> with progress(3, "training", stream=sys.stdout, clock=lambda: 0.0) as bar:
        ...     for step in range(3):
        ...         bar.update(1, "loss 0.5")
        training: step 3/3, loss 0.5
    """
    to: IO[str] = sys.stderr if stream is None else stream
    if to.isatty():
        with _bar(total, description, to) as bar:
            yield bar
        return
    lines = _Lines(total, description, to, clock)
    yield lines
    lines.finish()


class _Lines:
    """Plain lines for logs and pipes."""

    def __init__(self, total: int, description: str, stream: IO[str], clock: Callable[[], float]) -> None:
        self._total, self._description, self._stream, self._clock = total, description, stream, clock
        self._done, self._text = 0, ""
        self._start = self._last = clock()
        self._silent = True

    def update(self, n: int = 1, text: str = "") -> None:
        self._done += n
        self._text = text or self._text
        if self._clock() - self._last >= INTERVAL_S:
            self._say()

    def finish(self) -> None:
        """A run too short for any line still leaves one."""
        if self._silent and self._done:
            self._say()

    def _say(self) -> None:
        self._last, self._silent = self._clock(), False
        passed = self._last - self._start
        parts = [f"{self._description}: step {self._done}/{self._total}", self._text]
        parts.append(f"{self._done / passed:.1f} steps/s" if passed > 0 else "")
        print(printable(", ".join(part for part in parts if part)), file=self._stream, flush=True)


class _Bar:
    """A rich progress bar behind the same two calls."""

    def __init__(self, display: Any, task: Any) -> None:
        self._display, self._task = display, task

    def update(self, n: int = 1, text: str = "") -> None:
        self._display.update(self._task, advance=n, **({"text": printable(text)} if text else {}))


@contextmanager
def _bar(total: int, description: str, stream: IO[str]) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Display

    # markup off: a name in square brackets is a name, not a style
    words, note = TextColumn("{task.description}", markup=False), TextColumn("{task.fields[text]}", markup=False)
    columns = (words, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), note)
    with Display(*columns, console=Console(file=stream)) as display:
        yield _Bar(display, display.add_task(printable(description), total=total, text=""))
