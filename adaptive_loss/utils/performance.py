"""How long, how much memory, how fast."""

from __future__ import annotations

import math
import sys
import time
from types import TracebackType


class Timer:
    """Adds up the wall-clock seconds spent inside its ``with`` blocks.

    Attributes:
        seconds: the total so far, running block included, on top of ``before``.
        count: how many blocks were entered.
        before: seconds that an earlier process spent, where a run goes on.

    Example:
        >>> timer = Timer()
        >>> for _ in range(3):
        ...     with timer:
        ...         pass
        >>> timer.count, timer.seconds >= 0.0
        (3, True)
    """

    def __init__(self) -> None:
        self.count = 0
        self.before = 0.0
        self._total = 0.0
        self._since: float | None = None

    @property
    def seconds(self) -> float:
        """Total seconds so far."""
        return self.before + self._here()

    def _here(self) -> float:
        return self._total + (0.0 if self._since is None else time.perf_counter() - self._since)

    def __enter__(self) -> Timer:
        if self._since is not None:
            raise RuntimeError("this Timer is already running; use a second one for a nested block")
        self.count += 1
        self._since = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._total, self._since = self._here(), None


def peak_memory_mb() -> float:
    """Largest memory so far, in MiB: the GPU's where CUDA was used, else this process's resident set.

    NaN where the operating system does not say.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # bytes there, KiB elsewhere


def throughput(count: float, seconds: float) -> float:
    """Items a second; 0 before any time has passed.

    Example:
        >>> throughput(64, 0.5)
        128.0
    """
    return count / seconds if seconds > 0.0 else 0.0
