"""One pair of processes; ``make torture`` does 20."""

from __future__ import annotations

from tests.reliability.determinism import pairs


def test_the_same_bytes_under_another_hash_seed() -> None:
    row = pairs(1)
    assert row.failures == 0, row.note
