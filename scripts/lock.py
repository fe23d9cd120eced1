"""Write requirements.lock: the pins of requirements.txt with the SHA-256 of what pip takes for this machine.

    .venv/bin/python scripts/lock.py

torch is left out: there is a build of it for every kind of accelerator, and each has another hash.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HEAD = f"""\
# requirements.txt with hashes, for Python {sys.version_info[0]}.{sys.version_info[1]} on {sys.platform}; made by
# scripts/lock.py, and to be made again for another Python or system. torch is not in it: there is a build of it for
# every kind of accelerator, and each has another hash. Install a torch of your trust first, then
#   pip install --require-hashes --no-deps -r requirements.lock
"""


def main() -> int:
    """Ask pip, without installing anything, which files it would take, and write their hashes."""
    pins = [
        line for line in (ROOT / "requirements.txt").read_text().splitlines() if not line.startswith(("#", "torch="))
    ]
    with tempfile.TemporaryDirectory() as folder:
        wanted, report = Path(folder, "pins.txt"), Path(folder, "report.json")
        wanted.write_text("\n".join(pins) + "\n")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--no-deps"]
        subprocess.run([*command, "--report", str(report), "-r", str(wanted)], check=True)
        files = json.loads(report.read_text())["install"]
    (ROOT / "requirements.lock").write_text(HEAD + "".join(sorted(map(entry, files), key=str.lower)))
    print(f"{len(files)} packages in requirements.lock")
    return 0


def entry(file: dict) -> str:
    """One package of pip's report as a line of a requirements file."""
    about, digest = file["metadata"], file["download_info"]["archive_info"]["hashes"]["sha256"]
    return f"{about['name']}=={about['version']} --hash=sha256:{digest}\n"


if __name__ == "__main__":
    sys.exit(main())
