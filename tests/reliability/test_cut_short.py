"""The command killed, signalled and out of disk, a few times each; the torture does it a few hundred times."""

from __future__ import annotations

import os

import pytest

from tests.reliability import full_disk, kill_checkpoint, sigterm
from tests.reliability.rows import Row

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def check(row: Row, trials: int) -> None:
    assert (row.trials, row.failures) == (trials, 0), row.note


def test_killed() -> None:
    check(kill_checkpoint.torture(kills=3, at_random_times=1), 3)


def test_out_of_disk() -> None:
    check(full_disk.torture(faults=3), 3)


def test_signalled() -> None:
    check(sigterm.torture(signals=3), 3)
