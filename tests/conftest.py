"""What the test run's summary says of the rules' conformance."""

from __future__ import annotations

import gc
from typing import Any

SUITES = (
    "tests/test_weighting.py",
    "tests/test_rules_laws.py",
    "tests/test_rules_train.py",
    "tests/test_host_syncs.py",
)


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
