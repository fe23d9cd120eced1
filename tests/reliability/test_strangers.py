"""The payloads, and a few mutated files; ``make torture`` does 4,000."""

from __future__ import annotations

import pytest
import torch

from tests.reliability.strangers import mutated, payloads


def test_nothing_is_executed() -> None:
    row = payloads()
    assert row.trials >= 30
    assert row.failures == 0, row.note


def test_mutated_files_are_read_or_refused() -> None:
    row = mutated(240)
    assert row.failures == 0, row.note


def test_the_payloads_bite_where_a_file_is_unpickled(monkeypatch: pytest.MonkeyPatch) -> None:
    unsafe = torch.load
    monkeypatch.setattr(torch, "load", lambda file, weights_only: unsafe(file, weights_only=False))
    row = payloads()
    assert row.failures >= 20, row.note
