"""The benchmark of the VAE's KL weight: its arms, and its table from given rows."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from adaptive_loss.utils.config import validate


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "generative_benchmark", Path(__file__).parents[1] / "benchmarks" / "generative.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


def test_arms_are_pairs_by_seed_in_folders_of_their_own(benchmark: ModuleType) -> None:
    todo = benchmark.specs(benchmark.Flags(seeds=(1, 2)))
    assert len(todo) == 2 * (5 + 4) == len({spec.folder for spec in todo})
    for spec in todo:
        validate(spec.config)
    adaptive = [spec.config for spec in todo if spec.config.mode != "baseline"]
    assert {(c.objective, c.weights["kl"]) for c in adaptive} == {
        (objective, kl) for objective in ("elbo", "sample_quality") for kl in (0.01, 100.0)
    }


def test_table_has_means_of_what_finished_and_counts_the_rest(benchmark: ModuleType) -> None:
    def row(kid: float) -> dict[str, object]:
        numbers = {"test_own_kid": kid, "test_own_frechet": 2.0, "test_bits_per_dim": 0.5}
        return {"mode": "fixed 1", "status": "ok", "weights": {"final": {"kl": 1.0}}, **numbers}

    lines = benchmark.table([row(0.1), row(0.3), {"mode": "fixed 1", "status": "failed"}]).splitlines()
    assert lines[1].split() == ["fixed", "1", "1", "0.2", "2", "0.5"]
    assert lines[2].split() == ["fixed", "1", "1", "failed"]
