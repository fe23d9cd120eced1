"""How hard to try: ``python -m tests.reliability --quick`` divides every number of trials."""

from __future__ import annotations

import os

VARIABLE = "TORTURE_DIVISOR"
QUICK = 10


def trials(full: int) -> int:
    """``full`` trials, or with ``--quick`` a tenth of them, one at least."""
    return max(1, full // int(os.environ.get(VARIABLE, "1")))
