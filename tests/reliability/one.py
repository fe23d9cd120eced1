"""One torture module in its own process: ``python -m tests.reliability.one MODULE FILE DIVISOR`` writes rows to FILE.

A module's ``torture`` may take numbers of trials as arguments with defaults; DIVISOR divides each of them.
"""

from __future__ import annotations

import importlib
import inspect
import json
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path


def main(module: str, file: str, divisor: str) -> None:
    """Call the module's ``torture()`` and write what it gave back as JSON."""
    # A shell makes what it starts in the background deaf to SIGINT, and that is inherited.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torture = importlib.import_module(module).torture
    result = torture(**divided(torture, int(divisor)))
    rows = result if isinstance(result, list) else [result]
    Path(file).write_text(json.dumps([asdict(row) for row in rows]), encoding="utf-8")


def divided(torture: Callable[..., object], divisor: int) -> dict[str, int]:
    """The numbers of trials that ``torture`` takes by default, divided; one at least."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(torture).parameters.items()}
    return {name: max(1, value // divisor) for name, value in defaults.items() if type(value) is int}


if __name__ == "__main__":
    main(*sys.argv[1:])
