"""Every rule by its name on a real task: it trains fifty steps without a warning, or says in one line what it needs."""

from __future__ import annotations

import inspect
import json
import math
import re
import sys
import warnings
from functools import cache
from pathlib import Path

import pytest
import torch

from adaptive_loss import catalogue
from adaptive_loss.data.base import Dataset
from adaptive_loss.data.digits import load
from adaptive_loss.errors import UsageError
from adaptive_loss.trainer import train_task
from adaptive_loss.trainer.training import prepare
from adaptive_loss.utils.config import RunConfig
from adaptive_loss.weighting import TORCHJD, weightings
from adaptive_loss.weighting._torchjd_methods import METHODS
from adaptive_loss.weighting._torchjd_objects import _OPTIONS
from adaptive_loss.weighting.torchjd import rule_class

STEPS = 50
UNMET = {
    "ada": "observations: none had come by step 4",
    "adaptive_kl": "targets: say what to hold",
    "free_bits": "targets: say what to hold",
    "geco": "targets: say what to hold",
    "pi": "targets: say what to hold",
    "debiased": "noise levels: make it with levels",
    "edm": "noise levels: make it with levels",
    "edm2_uncertainty": "noise levels: make it with levels",
    "min_snr": "noise levels: make it with levels",
    "p2": "noise levels: make it with levels",
    "replay": "a schedule: make it with Replay",
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
    training = prepare(config, digits())
    task, executor, totals = training.task, training.executor, []
    for _, rows in zip(range(STEPS), training.batches, strict=False):
        losses = task.losses(rows)
        assert training.learner.learn(losses, task.tap).applied
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
        # What it can go on without is a warning, which is an error here.
        with pytest.raises((UsageError, UserWarning), match=re.escape(f"weighting {rule!r} needs {need}")):
            trained(rule)


@pytest.mark.parametrize("rule", ["pi", "shares"])
def test_a_need_that_no_flag_gives_is_one_line_of_usage(
    rule: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = train_task.main(["vae", "--weighting", rule, "--epochs", "1", "--output-dir", str(tmp_path)])
    (line,) = capsys.readouterr().err.splitlines()
    assert code == 2 and line.startswith(f"error: weighting {rule!r} needs ")


def test_the_catalogue_knows_every_rule() -> None:
    rules = {rule.name: rule for rule in catalogue.catalogue()}
    assert set(rules) == {*weightings.names(), *TORCHJD}
    assert all(rule.summary and rule.family and rule.cost in catalogue.COSTS for rule in rules.values())
    assert "gradients" in rules["gradnorm"].needs and rules["fixed"].needs == ()
    assert [rules[name].cost for name in ("fixed", "gradnorm", "upgrad")] == ["host", "heads", "solver"]


def test_the_table_shows_family_needs_and_cost_class(capsys: pytest.CaptureFixture[str]) -> None:
    assert catalogue.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "gradients:" in lines and f"cost host: {catalogue.COSTS['host']}" in lines
    for rule in catalogue.catalogue():
        (line,) = (line for line in lines if line.split()[:1] == [rule.name])
        assert line.endswith(f"cost {rule.cost}]") and all(need in line for need in rule.needs)
    assert lines[-1].startswith(f"{len(weightings.names()) + len(TORCHJD)} rules; ")


def test_pages_are_written_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert catalogue.main(["--write", str(tmp_path / "rules"), "--json"]) == 0
    files = json.loads(capsys.readouterr().out)["files"]
    assert {Path(file).read_text(encoding="utf-8") for file in files} == set(catalogue.pages().values())


@pytest.mark.parametrize("rule", [*weightings.names(), *TORCHJD])
def test_a_page_has_all_that_a_user_asks_for(rule: str) -> None:
    text = " ".join(catalogue.page(rule).split())
    for part in ("Choose it when", "Metrics it logs", "Deviations", "Example", "(n_terms"):
        assert part in text, part
    assert "Reference" in text or rule in ("equal", "fixed", "replay", "shares")


def test_a_page_shows_the_defaults() -> None:
    assert "EnCodec(n_terms: int, total: float = 1.0, decay: float = 0.999," in catalogue.page("encodec")
    assert 'torchjd_rule(n_terms, "CAGrad", c=0.5, norm_eps=0.0001)' in catalogue.page("cagrad")


@pytest.mark.parametrize("short", TORCHJD)
def test_the_defaults_told_of_torchjds_rules_are_theirs_or_the_adapter_s(short: str) -> None:
    pytest.importorskip("torchjd")
    method = TORCHJD[short]
    wanted = dict(inspect.signature(weightings.get(short).kind).parameters)
    wanted.pop("n_tasks", None)
    defaults = {name: parameter.default for name, parameter in wanted.items()} | _OPTIONS.get(method, {})
    told = ", ".join(f"{name}={value!r}" for name, value in defaults.items())
    assert METHODS[method].options == told.replace("'", '"')


def test_a_page_of_torchjds_needs_no_torchjd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchjd", None)
    rule_class.cache_clear()
    assert catalogue.page("upgrad").startswith("# upgrad\n")
    assert catalogue.page("torchjd:UPGrad") == catalogue.page("upgrad")


def test_a_scalarizer_of_torchjds_has_a_page_too() -> None:
    pytest.importorskip("torchjd")
    assert 'torchjd_rule(n_terms, "STCH", **options)' in catalogue.page("torchjd:STCH")


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
