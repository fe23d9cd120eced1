"""What the test run's summary says of the rules' conformance."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from typing import Any

import pytest

SUITES = (
    "tests/test_weighting.py",
    "tests/test_rules_laws.py",
    "tests/test_rules_train.py",
    "tests/test_host_syncs.py",
)


@pytest.fixture(scope="module", autouse=True)
def _disk_is_not_waited_for(request: pytest.FixtureRequest) -> Iterator[None]:
    """Power is never cut here, and a disk that others use can take a second for each fsync; the torture does them."""
    with pytest.MonkeyPatch.context() as patch:
        if "reliability" not in request.path.parts:
            patch.setattr(os, "fsync", os.fstat)  # which refuses what is no open file, too
        yield


def pytest_collection_finish(session: Any) -> None:
    """Leave out of every later garbage collection, of which a study makes one a run, what all the imports made."""
    gc.freeze()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """One line: how many rules the conformance suites knew, and how many tests they made of them."""
    from adaptive_loss.weighting import TORCHJD, weightings

    counts = {
        outcome: sum(report.nodeid.startswith(SUITES) for report in terminalreporter.stats.get(outcome, []))
        for outcome in ("passed", "failed", "skipped")
    }
    if any(counts.values()):
        told = ", ".join(f"{count} {outcome}" for outcome, count in counts.items() if count)
        rules = f"{len(weightings.names())} rules of ours and {len(TORCHJD)} of TorchJD's"
        terminalreporter.write_line(f"conformance of {rules}: {told}")
