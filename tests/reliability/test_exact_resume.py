"""A run that is cut goes on as if it had not been: one cut of every rule here, fifty in the torture."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.reliability.exact_resume import KINDS, RULES, Setting, resumed, whole


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "nash_mtl"])  # whose solver is slow
def test_every_rule(rule: str, tmp_path: Path) -> None:
    setting, cuts = Setting(rule, seed=1), random.Random(rule).choice(tuple(KINDS.values()))
    whole(setting, tmp_path / "whole")
    assert resumed(setting, tmp_path / "whole", random.Random(rule).choice(cuts), tmp_path / "again") == []


@pytest.mark.parametrize("kind", KINDS)
def test_batches_that_workers_fetched_ahead_are_not_lost(kind: str, tmp_path: Path) -> None:
    setting = Setting("dwa", seed=2, workers=2)
    whole(setting, tmp_path / "whole")
    assert resumed(setting, tmp_path / "whole", KINDS[kind][-1], tmp_path / "again") == []
