"""What an ablation mode is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from adaptive_loss.modulator import Modulator


def nothing(_: Path | None) -> tuple[Modulator, ...]:
    """No modulators: the base weighting alone."""
    return ()


@dataclass(frozen=True)
class Mode:
    """One arm of a study.

    Args:
        modulators: makes the modulators of the run's executor, in order, from a policy's folder or, for None, from the
            package's own policy; it raises ValueError for a policy that cannot be read.
        base_only: train on the base term alone.
        all_data: train on the probe and select splits too, so that what holding out costs is visible.
        by_bucket: take a task's rule for one loss in buckets, where it has one, in place of the modulators.
    """

    modulators: Callable[[Path | None], tuple[Modulator, ...]] = nothing
    base_only: bool = False
    all_data: bool = False
    by_bucket: bool = False

    @property
    def adapts(self) -> bool:
        """Whether anything moves the weights."""
        return self.modulators is not nothing
