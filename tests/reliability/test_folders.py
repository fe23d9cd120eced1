"""Sixteen processes at once; ``make torture`` does it ten times."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.reliability import folders
from tests.reliability.rows import Row


@pytest.mark.parametrize("kind", [folders.studies, folders.runs])
def test_nothing_is_overwritten(kind: Callable[[int], Row]) -> None:
    row = kind(1)
    assert (row.trials, row.failures) == (16, 0), row.note
