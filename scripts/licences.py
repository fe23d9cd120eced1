"""Write docs/licences.md: the licence of every pinned package, as the installed one states it.

.venv/bin/python scripts/licences.py
"""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HEAD = """\
# Licences of what is used

Made by `python scripts/licences.py` from the metadata of the installed packages. The library itself needs torch, numpy,
tyro and rich; the rest are extras and tools of development. This project's own licence is [MIT](../LICENSE).

| package | version | licence |
|---|---|---|
"""


def main() -> int:
    """Write the page; 1 if a package is not installed or states no licence."""
    pins = [line.split("==") for line in (ROOT / "requirements.txt").read_text().splitlines() if "==" in line]
    rows = [(name, version, licence(name)) for name, version in pins]
    lines = [f"| {name} | {version} | {stated or 'not stated'} |\n" for name, version, stated in rows]
    (ROOT / "docs" / "licences.md").write_text(HEAD + "".join(lines), encoding="utf-8")
    silent = [name for name, _, stated in rows if stated is None]
    print(f"{len(rows)} packages in docs/licences.md" + (f"; no licence for {', '.join(silent)}" if silent else ""))
    return 1 if silent else 0


def licence(name: str) -> str | None:
    """What the installed package says: its expression, else its classifiers, else the first line of its text."""
    try:
        about = metadata(name)
    except PackageNotFoundError:
        return None
    if about["License-Expression"]:
        return about["License-Expression"]
    classifiers = [c.split(" :: ")[-1] for c in about.get_all("Classifier") or [] if c.startswith("License :: ")]
    named = [c for c in classifiers if c != "OSI Approved"]
    text = (about["License"] or "").strip().splitlines()
    return ", ".join(named) or (text[0][:80] if text else None)


if __name__ == "__main__":
    sys.exit(main())
