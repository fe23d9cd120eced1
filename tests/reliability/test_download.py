"""Part of what ``make torture`` does to the download; tests/test_data_cifar10.py has the rest."""

from __future__ import annotations

from tests.reliability.download import corrupted


def test_corruptions_of_every_kind_are_refused() -> None:
    row = corrupted(10)
    assert (row.trials, row.failures) == (10, 0), row.note
