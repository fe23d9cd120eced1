"""Every rule by its name on a real task: it trains fifty steps without a warning, or says in one line what it needs."""

from __future__ import annotations

import math
import re
import warnings
from functools import cache
from pathlib import Path

import pytest
import torch

from adaptive_loss import catalogue
from adaptive_loss.data.base import Dataset
from adaptive_loss.data.digits import load
from adaptive_loss.trainer import loop
from adaptive_loss.utils.config import RunConfig
from adaptive_loss.weighting import TORCHJD, weightings

STEPS = 50
UNMET = {
    "ada": None,  # observations never given turn no knob, and the weights are 1
    "adaptive_kl": "targets: say what to hold",
    "free_bits": "targets: say what to hold",
    "geco": "targets: say what to hold",
    "pi": "targets: say what to hold",
    "debiased": "noise levels: make it with levels",
    "edm": "noise levels: make it with levels",
    "edm2_uncertainty": "noise levels: make it with levels",
    "min_snr": "noise levels: make it with levels",
    "p2": "noise levels: make it with levels",
    "shares": "shares: make it with Shares",
    "switch_on": "a term and a time: make it with SwitchOn",
    "wind_down": "a term and a sign: make it with WindDown",
}


@cache
def digits() -> Dataset:
    return load(seed=0)


def trained(rule: str) -> float:
    """The VAE's mean total over the last ten of fifty steps under the rule."""
    config = RunConfig(task="vae", dataset="digits", weighting=rule, epochs=1, batch_size=20, lr=3e-3, precision="fp32")
    training = loop.prepare(config, digits())
    task, executor, totals = training.task, training.executor, []
    for _, rows in zip(range(STEPS), training.batches, strict=False):
        training.optimizer.zero_grad()
        losses = task.losses(rows)
        executor(losses, tap=task.tap).backward()
        assert executor.step(training.optimizer).applied
        totals.append(sum(float(loss.detach()) for loss in losses.values()))
    assert len(totals) == STEPS and all(math.isfinite(weight) for weight in executor.weights.values())
    return sum(totals[-10:]) / 10


@pytest.mark.parametrize("rule", [*weightings.names(), *TORCHJD])
def test_it_trains_or_says_what_it_needs(rule: str) -> None:
    if rule in TORCHJD:
        pytest.importorskip("torchjd")
    torch.manual_seed(0)
    need = UNMET.get(rule)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if need is None:
            assert trained(rule) < 42.0  # 44.4 nats at the start: 64 pixels at log 2, and no KL
            return
        with pytest.raises(ValueError, match=re.escape(f"weighting {rule!r} needs {need}")):
            trained(rule)


def test_the_catalogue_knows_every_rule() -> None:
    rules = {rule.name: rule for rule in catalogue.catalogue()}
    assert set(rules) == {*weightings.names(), *TORCHJD}
    assert all(rule.summary and rule.family and rule.cost for rule in rules.values())
    assert "gradients" in rules["gradnorm"].needs and rules["fixed"].needs == ()


@pytest.mark.parametrize("rule", weightings.names())
def test_a_page_has_all_that_a_user_asks_for(rule: str) -> None:
    text = " ".join(catalogue.page(rule).split())
    for part in ("Choose it when", "Metrics it logs", "Deviations", "Example"):
        assert part in text, part
    assert "Reference" in text or rule in ("equal", "fixed", "shares")


def test_a_docstring_becomes_markdown() -> None:
    text = "Adds ``a``.\n\nArgs:\n    a: one,\n        or none.\n    b: two.\n\nExample:\n    >>> 1 + 1\n    2\n"
    assert catalogue.markdown(text) == (
        "Adds `a`.\n\n**Args**\n\n- a: one, or none.\n- b: two.\n\n**Example**\n\n```python\n>>> 1 + 1\n2\n```"
    )


def test_the_pages_in_docs_are_those_of_the_docstrings() -> None:
    folder = Path(__file__).parents[1] / "docs/rules"
    written = {file.name: file.read_text(encoding="utf-8") for file in folder.glob("*.md")}
    del written["choosing.md"]
    assert written == catalogue.pages(), "run: adaptive-loss rules --write docs/rules"
