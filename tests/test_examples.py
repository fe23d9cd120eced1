"""Every example runs, in its shortest form."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from tests.test_packaging import top_level

EXAMPLES = Path(__file__).parents[1] / "examples"
SHORTEST = {"stable_baselines3_dqn": {"decisions": 55, "judged": 1}}
"""Arguments of ``main``; an example that is not named runs as it is."""


@pytest.mark.parametrize("name", sorted(file.stem for file in EXAMPLES.glob("*.py")))
def test_an_example_runs_and_tells_what_it_found(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = EXAMPLES / f"{name}.py"
    for package in sorted(top_level(file)):
        pytest.importorskip(package)
    runpy.run_path(str(file))["main"](**SHORTEST.get(name, {}))
    assert capsys.readouterr().out.strip()
