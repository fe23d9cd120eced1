"""The flags that both pre-trainings take, and their settings as files tell them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from adaptive_loss.errors import UsageError
from adaptive_loss.meta.fleet import STEPS
from adaptive_loss.meta.problems import families_to_train_on
from adaptive_loss.records import json_dump


@dataclass(frozen=True, kw_only=True)
class PretrainFlags:
    """What is trained on, how long, and where the policy goes."""

    output_dir: Path
    seed: int = 0
    """Seed of what is trained and of the runs that it is trained on."""
    steps: int = STEPS
    """Length of the runs in optimizer steps."""
    families: tuple[str, ...] = ()
    """Families to train on, file names in adaptive_loss/meta/families; all that may be where none is named."""
    without: tuple[str, ...] = ()
    """Families to leave out, to be judged on later."""
    jobs: int = 0
    """Processes; 0 is one a core."""

    @property
    def names(self) -> list[str]:
        """The families that are trained on."""
        return families_to_train_on(self.families, self.without)

    def settings(self) -> dict[str, Any]:
        """All that the result depends on, as JSON reads it back."""
        told = {name: value for name, value in asdict(self).items() if name not in ("output_dir", "jobs")}
        return json.loads(json_dump(told))

    def check(self, least: dict[str, int], seeds: int) -> None:
        """Refuse numbers that are too small, seeds whose runs would reach those that judge, and a file as the folder.

        Args:
            least: flag → its least value.
            seeds: how many seeds there are.

        Raises:
            UsageError: with the flag and what to give.
        """
        for name, number in {**least, "jobs": 0}.items():
            if getattr(self, name) < number:
                raise UsageError(f"--{name.replace('_', '-')} is {getattr(self, name)}; give at least {number}")
        if not 0 <= self.seed < seeds:
            raise UsageError(f"--seed is {self.seed}; give 0 to {seeds - 1}, so that the runs that judge stay unseen")
        if self.output_dir.is_file():
            raise UsageError(f"--output-dir {self.output_dir} is a file; give a folder")
