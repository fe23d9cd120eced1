"""Look the pinned requirements up among the known vulnerabilities, by pip-audit in an environment of its own.

    python scripts/audit.py

Exit code 1 if a pin has one. Where pip-audit or its data cannot be reached within the time, one line says so and the
exit code is 0: no network is no reason for a build to fail.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

REQUIREMENTS = Path(__file__).resolve().parents[1] / "requirements.txt"
AUDITOR = "pip-audit==2.10.1"
LIMIT_S = 55.0


def main() -> int:
    """The command line; returns the exit code."""
    try:
        report = audit(REQUIREMENTS, time.monotonic() + LIMIT_S)
    except (subprocess.SubprocessError, OSError, ValueError) as error:
        print(f"audit: skipped, pip-audit or its data cannot be reached here ({type(error).__name__})")
        return 0
    code, line = verdict(report["dependencies"])
    print(line)
    return code


def audit(requirements: Path, deadline: float) -> dict[str, Any]:
    """pip-audit's report, as JSON.

    Raises:
        SubprocessError, OSError, ValueError: it cannot be installed, takes too long, or reports nothing.
    """
    with tempfile.TemporaryDirectory() as folder:
        python = str(Path(folder, "bin", "python"))
        _run([sys.executable, "-m", "venv", folder], deadline, check=True)
        _run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", AUDITOR], deadline, check=True)
        options = ["--no-deps", "--disable-pip", "--progress-spinner", "off", "--timeout", "5", "-f", "json"]
        said = _run([python, "-m", "pip_audit", "-r", str(requirements), *options], deadline, check=False)
        return json.loads(said)


def _run(command: Sequence[str], deadline: float, check: bool) -> str:
    left = max(0.1, deadline - time.monotonic())
    return subprocess.run(command, timeout=left, check=check, capture_output=True, text=True).stdout


def verdict(packages: Sequence[dict[str, Any]]) -> tuple[int, str]:
    """Exit code and line for the packages of a report; those that were not found were not audited."""
    audited = [package for package in packages if "skip_reason" not in package]
    found = [
        f"{package['name']} {package['version']}: {flaw['id']} (mended in {', '.join(flaw['fix_versions']) or 'none'})"
        for package in audited
        for flaw in package["vulns"]
    ]
    if not audited:
        return 0, "audit: skipped, its data cannot be reached here (none of the packages was found)"
    if found:
        return 1, "audit: " + "; ".join(found)
    return 0, f"audit: no known vulnerability in {len(audited)} of {len(packages)} packages"


if __name__ == "__main__":
    sys.exit(main())
