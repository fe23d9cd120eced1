"""The torture of the guards in its quick form, and that it would notice."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptive_loss import gradient_gate
from tests.reliability import accumulation, mixed_precision, non_finite, rollback, rule_state, spike_gate
from tests.reliability.rows import Row

QUICK: dict[ModuleType, int] = {non_finite: 60, spike_gate: 64_000, rollback: 2, mixed_precision: 5}


@pytest.mark.parametrize("module", QUICK, ids=lambda module: module.__name__.rpartition(".")[2])
def test_quick_form(module: ModuleType) -> None:
    row: Row = module.torture(QUICK[module])
    assert row.failures == 0, row.note
    assert row.trials >= QUICK[module]


@pytest.mark.parametrize("size", accumulation.SIZES)
@pytest.mark.parametrize("rule", ["fixed", "dwa", "uncertainty", "gradnorm", "famo"])
def test_accumulation(rule: str, size: int) -> None:
    assert max(accumulation.errors(rule, size, seed=0)) <= accumulation.ALLOWED


@pytest.mark.parametrize("rule", ["dwa", "uncertainty", "gradnorm", "rlw", "pi", "switch_on", "famo"])
def test_rule_state(rule: str) -> None:
    assert rule_state.differing(rule, [0, 17, 44]) == []


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31))
def test_no_stream_of_losses_gets_a_non_finite_number_in(seed: int) -> None:
    assert non_finite.stream(seed + 10_000) == []


def test_a_gate_without_a_limit_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradient_gate, "greatest_norm", lambda gradients: float("inf"))
    assert non_finite.torture(60).failures > 3


def test_a_gate_that_learns_from_spikes_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    series = spike_gate.FAMILIES["lognormal, sigma 0.3"](400, torch.Generator().manual_seed(0))
    assert spike_gate.spikes_missed(series, torch.Generator().manual_seed(0)) == 0
    inner = spike_gate.SpikeGate.worst
    monkeypatch.setattr(
        spike_gate.SpikeGate, "worst", lambda gate, values, there: gate.admit(values) or inner(gate, values, there)
    )
    assert spike_gate.spikes_missed(series, torch.Generator().manual_seed(0)) > 0
