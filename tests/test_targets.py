"""`--targets` from the command line to the law that holds the term."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from adaptive_loss import cli
from adaptive_loss.data.digits import load
from adaptive_loss.errors import UsageError
from adaptive_loss.modes import modes
from adaptive_loss.modulator import SetPoint
from adaptive_loss.tasks import tasks
from adaptive_loss.trainer import training
from adaptive_loss.trainer.training import prepare
from adaptive_loss.utils.config import RunConfig, from_json, held_targets, to_json, validate
from adaptive_loss.weighting._set_point import HeldTargets

CONFIG = RunConfig(task="vae", dataset="digits", targets={"kl": 8.0}, device="cpu")
TRAIN = ["train", "vae", "--smoke", "--json", "--output-dir"]


def test_targets_survive_the_disk_and_make_a_run_another_one() -> None:
    assert from_json(json.loads(json.dumps(to_json(CONFIG)))) == CONFIG
    older = {name: value for name, value in to_json(RunConfig()).items() if name != "targets"}
    assert from_json(older).targets == {}


@pytest.mark.parametrize("target", [math.nan, math.inf])
def test_targets_that_are_no_number_are_refused_with_their_term(target: float) -> None:
    with pytest.raises(UsageError, match=f"--targets kl={target}: a target is a finite number"):
        validate(replace(CONFIG, targets={"kl": target}))


@pytest.mark.parametrize(
    ("target", "weight", "why"),
    [
        ("no", 1.0, "'no', which is unknown; choose from: kl"),
        ("rec", 1.0, "'rec', which is the base term, whose weight stays put; choose from: kl"),
        ("kl", 0.0, "'kl', which has weight 0, so that nothing can hold it; choose from: none"),
    ],
)
def test_what_cannot_have_a_target_is_refused_with_the_choices(target: str, weight: float, why: str) -> None:
    config = replace(CONFIG, targets={target: 1.0})
    with pytest.raises(UsageError, match=f"--targets names {why}"):
        held_targets(config, {"rec": 1.0, "kl": weight}, "rec")


def test_a_rule_with_a_law_holds_the_term_and_any_other_gets_the_set_point() -> None:
    ruled = prepare(replace(CONFIG, weighting="geco"), load()).executor
    assert isinstance(ruled.weighting, HeldTargets) and ruled.weighting.knobs["kl"].target == 8.0
    assert not ruled.modulators
    (held,) = prepare(CONFIG, load()).executor.modulators
    assert isinstance(held, SetPoint) and held.knobs["kl"].target == 8.0


def test_the_base_alone_has_nothing_to_hold() -> None:
    alone = prepare(replace(CONFIG, mode="base_only", weighting="pi"), load()).executor
    assert not alone.terms.targets and alone.weighting.name == "fixed"


@pytest.mark.parametrize("rule", ["pi", "geco", "adaptive_kl", "free_bits"])
def test_the_set_point_rules_hold_the_kl_from_the_command_line(
    rule: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # An untrained VAE's KL is far below 8 nats, so every one of these laws takes its weight down.
    assert cli.main([*TRAIN, str(tmp_path), "--weighting", rule, "--targets", "kl=8"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["weights"]["final"]["kl"] < 1.0 and row["weights"]["final"]["reconstruction"] == 1.0
    assert json.loads((Path(row["folder"]) / "config.json").read_text(encoding="utf-8"))["targets"] == {"kl": 8.0}


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--weighting", "pi"], "weighting 'pi' needs targets: say what to hold, --targets term=value"),
        (["--targets", "no=1"], "--targets names 'no', which is unknown; choose from: kl"),
        (["--targets", "kl"], "--targets: 'kl' is not TERM=NUMBER"),
        (["--targets", "kl=1", "--targets", "kl=2"], "--targets is given twice"),
    ],
)
def test_mistakes_are_one_line_before_the_run_begins(
    argv: list[str], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*TRAIN, str(tmp_path / "run"), *argv]) == 2
    error = capsys.readouterr().err
    assert line in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_task_may_hold_a_term_by_itself_where_a_mode_adapts() -> None:
    def held(**changes: Any) -> dict[str, float]:
        config = RunConfig(task="distill", dataset="digits", device="cpu", **changes)
        kind = tasks.get("distill")
        return training._start(config, kind, modes.get(config.mode)())[1]

    assert held(mode="baseline") == held(mode="base_only") == {}
    assert held(mode="controller_only") == held(mode="full") == {"reference": 1.5}
    assert held(mode="full", targets={"reference": 0.3}) == {"reference": 0.3}
    assert held(mode="full", weights={"reference": 0.0}) == {}
