"""Diagnosis: one line that names the term, the step, the last good values and what to try."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from test_executor import Given
from torch import nn

from adaptive_loss import LossExecutor
from adaptive_loss.diagnosis import diagnosis
from adaptive_loss.step_record import Cause, Rejection


@pytest.mark.parametrize("cause", [cause for cause in get_args(Cause) if cause != "overflow"])
@pytest.mark.parametrize("term", ["kl", None])
def test_every_cause_has_its_advice(cause: Cause, term: str | None) -> None:
    told = diagnosis(Rejection("it broke", term, cause), 12, {"rec": 0.5, "kl": math.nan})
    blamed = "the model" if term is None else "term 'kl'"
    assert told.startswith(f"{blamed}: it broke at step 12; last good values: rec 0.5, kl none yet; try: ")
    assert blamed in told.split("; try: ")[1] and "{" not in told and "\n" not in told


def test_who_gives_up_says_what_to_try() -> None:
    p = nn.Parameter(torch.tensor(1.0))

    def last_words(executor: LossExecutor, bad: float) -> str:
        optimizer = torch.optim.SGD([p], lr=0.0)
        for _ in range(20):
            executor({"a": p + 0, "b": p + 1}).backward()
            executor.step(optimizer)
        with pytest.raises(RuntimeError) as caught:
            for _ in range(10):
                executor({"a": p + 0, "b": p * bad}).backward()
                executor.step(optimizer)
        return str(caught.value)

    plain = last_words(LossExecutor({"a": 1.0, "b": 1.0}), math.inf)
    assert plain == (
        "10 steps in a row were rejected, the last one because of term 'b': the loss is inf at step 20; last good "
        "values: a 1, b 2; try: look at what goes into term 'b' (a log or a division of 0, an empty batch, inputs that "
        "are not finite), lower the learning rate or set Guards(clip_norm=1.0); Guards(quarantine=3) goes on without "
        "an auxiliary that stays bad"
    )
    assert "; try: Guards(spikes=False) where term 'b' is meant to jump" in last_words(
        LossExecutor({"a": 1.0, "b": 1.0}), 1e9
    )


def test_a_rule_that_gives_no_weight_is_told_from_a_bad_loss() -> None:
    p = nn.Parameter(torch.tensor(1.0))
    executor = LossExecutor({"a": 1.0, "b": 1.0}, weighting=Given(1.0, math.nan))
    with pytest.raises(
        RuntimeError, match=r"term 'b': its weight came out as nan at step 0; .*give LossExecutor another"
    ):
        for _ in range(10):
            executor({"a": p + 0, "b": p + 1})
