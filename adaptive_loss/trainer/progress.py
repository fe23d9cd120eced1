"""How far a study is, on stderr: a live line on a terminal, a plain line for every finished run elsewhere."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from adaptive_loss.trainer.simple_ablation_analysis import printable

if TYPE_CHECKING:
    from types import TracebackType

    from rich.progress import Progress as Bar

    from adaptive_loss.trainer.studies import Result, Spec


class Progress:
    """Counts finished runs, to be used in a ``with``; ``done`` is what the engine calls with every new row."""

    def __init__(self, total: int, done: int = 0) -> None:
        self._total = total
        self._count = done
        self._bar = _bar() if sys.stderr.isatty() else None

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._task = self._bar.add_task("runs", total=self._total, completed=self._count)
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def done(self, spec: Spec, row: Result) -> None:
        """Say that a run ended and how."""
        self._count += 1
        line = f"[{self._count}/{self._total}] {spec.label} seed {spec.config.seed}: {outcome(row)}"
        if self._bar is None:
            print(line, file=sys.stderr, flush=True)
        else:
            self._bar.update(self._task, completed=self._count)
            self._bar.console.print(line, markup=False, highlight=False)


def outcome(row: Result) -> str:
    """How a run ended, in a few words."""
    if row["status"] != "ok":
        return printable(row["status"])
    parts = [
        f"{name.replace('_', ' ')} {row[name]:.4f}" for name in ("test_accuracy", "test_loss") if _number(row, name)
    ]
    seconds = [f"{row['train_seconds']:.1f} s"] if _number(row, "train_seconds") else []
    return ", ".join(["ok", *parts, *seconds, *_warnings(row)])


def _warnings(row: Result) -> list[str]:
    """What a run that ended well has to say against itself; ``result.json`` has the reasons."""
    kinds = {"collapsed_opponents": "collapsed", "unreached_targets": "target not reached"}
    return [printable(f"{text}: {', '.join(found)}") for name, text in kinds.items() if (found := row.get(name))]


def _number(row: Result, name: str) -> bool:
    return isinstance(row.get(name), (int, float))


def _bar() -> Bar:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True))
