"""What a task is asked and cannot do: said on the console in one line, and in the result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from adaptive_loss import cli
from adaptive_loss.trainer.progress import outcome

DIGITS = ("--dataset", "digits", "--device", "cpu", "--precision", "fp32")


def trained(folder: Path, *words: str) -> dict[str, Any]:
    assert cli.main(["train", *words, *DIGITS, "--output-dir", str(folder)]) == 0
    (result,) = folder.rglob("result.json")
    return json.loads(result.read_text(encoding="utf-8"))


@pytest.mark.parametrize(("weighting", "target"), [("fixed", "1e-09"), ("geco", "-1e+06")])
def test_a_target_that_no_weight_reaches(
    weighting: str, target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # 120 steps: the weight is at its bound after about 93, and the alarm would sound after 1,000 more.
    flags = ("vae", "--epochs", "6", "--batch-size", "50", "--weighting", weighting, "--targets")
    result = trained(tmp_path / "low", *flags, f"kl={target}")
    assert (
        f"is observed and {target} is wanted: widen the bounds or move the target" in result["unreached_targets"]["kl"]
    )
    assert ", target not reached: kl\n" in capsys.readouterr().out
    assert trained(tmp_path / "fine", *flags, "kl=2")["unreached_targets"] == {}
    assert "not reached" not in capsys.readouterr().out


def test_what_a_run_says_against_itself() -> None:
    row = {"status": "ok", "test_loss": 0.5, "collapsed_opponents": {}, "train_seconds": 1.0}
    assert outcome(row) == "ok, test loss 0.5000, 1.0 s"
    told = outcome({**row, "collapsed_opponents": {"critic": "why"}, "unreached_targets": {"kl": "why", "x\n": ""}})
    assert told.startswith("ok, test loss 0.5000, 1.0 s, collapsed: critic, target not reached: kl, x")
    assert "\n" not in told


@pytest.mark.parametrize(
    ("task", "terms"),
    [
        ("vae", "reconstruction, kl"),
        ("vqgan", "reconstruction, perceptual, codebook, commitment, adversarial, hinge, lecam"),
    ],
)
def test_a_weight_for_a_term_that_is_not_there_lists_the_task_s(
    task: str, terms: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--smoke", "--weights", "perception=1", "--output-dir", str(tmp_path)]
    assert cli.main(["train", task, *DIGITS, *flags]) == 2
    assert capsys.readouterr().err == (f"error: --weights names the unknown term 'perception'; choose from: {terms}\n")
