"""A few rebuilt runs; ``make torture`` does 200."""

from __future__ import annotations

import pytest

from tests.reliability.tensorboard_files import rebuilt


def test_the_same_scalars() -> None:
    pytest.importorskip("tensorboard")
    row = rebuilt(6)
    assert row.failures == 0 and row.trials > 1000
