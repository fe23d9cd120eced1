"""One torture module in its own process: ``python -m tests.reliability.one MODULE FILE`` writes its rows to FILE."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import asdict
from pathlib import Path


def main(module: str, file: str) -> None:
    """Call the module's ``torture()`` and write what it gave back as JSON."""
    result = importlib.import_module(module).torture()
    rows = result if isinstance(result, list) else [result]
    Path(file).write_text(json.dumps([asdict(row) for row in rows]), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
