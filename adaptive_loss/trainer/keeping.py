"""When an unfinished run is saved."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from adaptive_loss.checkpoint import Checkpoints
from adaptive_loss.trainer.stopping import StopRequest
from adaptive_loss.utils.config import save_interval


class Keeper:
    """Saves a run every so often, and before it ends because somebody asked.

    Args:
        checkpoints: where to.
        every: as ``--save-every`` has it: steps (``"200"``) or seconds (``"30s"``).
        stop: hears the requests.
    """

    def __init__(self, checkpoints: Checkpoints, every: str, stop: StopRequest) -> None:
        self._checkpoints, self._stop = checkpoints, stop
        self._interval, self._unit = save_interval(every)
        self._saved_at = time.monotonic()

    def between_steps(self, step: int, state: Callable[[], Mapping[str, Any]]) -> None:
        """Save if it is time.

        Args:
            step: optimizer steps so far.
            state: gives what to save.

        Raises:
            Stopped: a request has come; the run is saved.
            RunError: it cannot be saved.
        """
        request = self._stop.asked()
        if request is None and not self._due(step):
            return
        self._checkpoints.save(step, state())
        self._saved_at = time.monotonic()
        if request is not None:
            raise request

    def _due(self, step: int) -> bool:
        if self._unit == "steps":
            return step % self._interval == 0
        return time.monotonic() - self._saved_at >= self._interval
