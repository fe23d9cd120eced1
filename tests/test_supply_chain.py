"""Pins with hashes, licences that are known, and an audit that tells apart nothing found from nothing asked."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from scripts import audit

ROOT = Path(__file__).parents[1]


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins() -> dict[str, str]:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if "==" in line]
    return {plain(name): version for name, version in pairs}


def test_the_lock_has_every_pin_but_torch_and_names_no_place() -> None:
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    locked = dict(re.fullmatch(r"(\S+)==(\S+) --hash=sha256:[0-9a-f]{64}", line).groups() for line in lines)  # type: ignore[union-attr]
    assert {plain(name): version for name, version in locked.items()} == {
        n: v for n, v in pins().items() if n != "torch"
    }
    assert "://" not in text and "index" not in text


def test_every_pin_s_licence_is_known() -> None:
    page = (ROOT / "docs" / "licences.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\S+) \| (\S+) \| (.+) \|$", page, re.MULTILINE)[1:]
    assert {plain(name): version for name, version, _ in rows} == pins()
    assert not [name for name, _, licence in rows if licence == "not stated"]


SOUND: dict[str, Any] = {"name": "a", "version": "1", "vulns": []}
FLAWED = {"name": "b", "version": "2", "vulns": [{"id": "CVE-1", "fix_versions": ["2.1"]}]}
UNKNOWN = {"name": "c", "skip_reason": "not found"}


@pytest.mark.parametrize(
    ("packages", "code", "line"),
    [
        ([SOUND, UNKNOWN], 0, "audit: no known vulnerability in 1 of 2 packages"),
        ([SOUND, FLAWED], 1, "audit: b 2: CVE-1 (mended in 2.1)"),
        ([UNKNOWN], 0, "audit: skipped, its data cannot be reached here (none of the packages was found)"),
    ],
)
def test_a_package_that_was_not_found_was_not_audited(packages: list[dict[str, Any]], code: int, line: str) -> None:
    assert audit.verdict(packages) == (code, line)


@pytest.mark.parametrize(
    "error", [subprocess.TimeoutExpired("pip", 1), subprocess.CalledProcessError(1, "pip"), ValueError("no JSON")]
)
def test_no_network_fails_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(audit, "audit", fail)
    assert audit.main() == 0
    assert capsys.readouterr().out.startswith("audit: skipped, pip-audit or its data cannot be reached here")


def test_the_audit_has_a_limit() -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        audit._run([sys.executable, "-c", "import time; time.sleep(60)"], deadline=0.0, check=True)
    assert audit.LIMIT_S <= 60
