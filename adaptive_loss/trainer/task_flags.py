"""The flags that say which task, and in which of its forms."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, TypeVar

import tyro

from adaptive_loss.errors import UsageError
from adaptive_loss.utils.config import Settings


@dataclass(frozen=True, kw_only=True)
class TaskFlags(Settings):
    """A task, what it is learned on, and its short forms."""

    task: tyro.conf.Positional[str] = "classify"
    """What is learned: a file name in adaptive_loss/tasks."""
    dataset: str = ""
    """What it is learned on, a file name in adaptive_loss/data; the task's own first where none is given."""
    output_dir: Annotated[Path, tyro.conf.arg(aliases=("--logdir",))] = Path("results")
    """Where everything goes; by default a folder in results/ named after the command and the task."""
    quick: bool = False
    """The task's short form, a minute at most; flags given beside it stay."""
    smoke: bool = False
    """The task's shortest form, to see that it runs."""


Flags = TypeVar("Flags", bound=TaskFlags)


def completed(flags: Flags, command: str) -> Flags:
    """``flags`` with what was not given: the task's dataset, the settings of its short form, and ``command``'s folder.

    Raises:
        UsageError: both short forms at once.
    """
    if flags.quick and flags.smoke:
        raise UsageError("--quick and --smoke exclude each other; give one of them")
    from adaptive_loss.tasks import tasks

    kind = tasks.get(flags.task)
    form = kind.smoke if flags.smoke else kind.quick if flags.quick else {}
    # two tasks must not meet in one folder
    own = {"dataset": kind.datasets[0], **form, "output_dir": Path(f"results/{command}_{flags.task}")}
    return replace(flags, **{name: own[name] for name in own if getattr(flags, name) == getattr(type(flags), name)})
