"""Data parallel training: one set of weights on all ranks, that of one process, and one decision."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from adaptive_loss import LossExecutor, parallel
from adaptive_loss.weighting import TORCHJD, weightings
from tests.reliability.parallel import SWITCHES, apart, gradient_rules
from tests.reliability.parallel_edges import RULE_STEPS
from tests.reliability.parallel_faults import KINDS, wrong
from tests.reliability.parallel_jobs import WEIGHTS
from tests.reliability.ranks import ROOT, Hang, launch

LIMIT = 500.0
"""Seconds a launch may take: some ten where two cores are free."""
SOLVERS = ["upgrad"] if find_spec("torchjd") else []  # for all of TorchJD's rules, which see the Gramian alone
pytestmark = pytest.mark.timeout(600)


def cases() -> dict[str, list[tuple[str, str]]]:
    """How the model is wrapped → rules, and where they take gradients."""
    ours = [name for name in gradient_rules() if name not in TORCHJD]
    everywhere = [(name, tap) for name in ("gradnorm", "lr_annealing", *SOLVERS) for tap in ("parameter", "both")]
    some = [*ours, "dwa", "uncertainty", "imtl_l", "edm2_uncertainty"]
    return {
        "ddp": [*((name, "features") for name in [*weightings.names(), *SWITCHES, *SOLVERS]), *everywhere],
        "fsdp": [*((name, "features") for name in some), ("gradnorm", "parameter")],
    }


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    """What two ranks tell of all the small jobs, in one launch: to start two processes takes longer than most jobs."""
    return launch("tests.reliability.parallel_edges:everything", 2, LIMIT, cases=cases())


def all_equal(found: list[Any]) -> bool:
    return all(told == found[0] for told in found)


# ---- every rule ---------------------------------------------------------------------------------------------------


def test_every_rule_finds_what_one_process_finds(ranks: list[dict[str, Any]]) -> None:
    found = [told["rules"]["ddp"] for told in ranks]
    assert set(found[0]) == {f"{name} at {tap}" for name, tap in cases()["ddp"]}
    assert [line for name in found[0] if (line := apart(name, [told[name] for told in found]))] == []
    assert all(told["applied"] == RULE_STEPS for told in found[0].values())


def test_under_fully_shard_they_do_too_but_at_parameters(ranks: list[dict[str, Any]]) -> None:
    whole = [told["rules"]["fsdp"] for told in ranks]
    assert [told["gradnorm at parameter"]["refused"] for told in whole] == 2 * [
        "weighting 'gradnorm' cannot take gradients at parameters that fully_shard has split: "
        "give features or the output as tap"
    ]
    found = [{name: told[name] for name in told if name != "gradnorm at parameter"} for told in whole]
    assert [line for name in found[0] if (line := apart(name, [told[name] for told in found]))] == []


# ---- the rest -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
def test_a_fault_on_one_rank_is_one_decision_on_all(ranks: list[dict[str, Any]], wrap: str) -> None:
    trials = list(zip(*(told["faults"][wrap] for told in ranks), strict=True))
    assert {trial[0]["fault"]["kind"] for trial in trials} == set(KINDS)
    assert [line for trial in trials if (line := wrong(trial))] == []


@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
def test_quarantine_and_rollback_are_the_same_everywhere(ranks: list[dict[str, Any]], wrap: str) -> None:
    found = [told["guarded"][wrap] for told in ranks]
    assert all_equal(found)
    losses = [[step, "loss", "b"] for step in (3, 4)]  # at two strikes it is left out, and watched until it is well
    blamed = found[0]["bad"][2][2]  # the first bad gradient is laid to the greatest loss, the next to whose it is
    assert found[0]["bad"] == [*losses, [14, "gradient", blamed], [15, "gradient", "b"], [16, "gradient", "b"]]
    assert found[0]["back"] == [16] and found[0]["out"][:5] == [4, 5, 6, 7, 8]


def test_norms_of_gradients_in_parts_are_those_of_the_whole(ranks: list[dict[str, Any]]) -> None:
    for told in ranks:
        assert told["split norm"] == pytest.approx([1.0] * 3, rel=1e-3)


@pytest.mark.parametrize("name", ["with a base", "without", "fully_shard"])
def test_controller_and_monitor_move_the_same_everywhere(ranks: list[dict[str, Any]], name: str) -> None:
    found = [told["systems"][name] for told in ranks]
    assert apart(name, found) is None
    if name == "fully_shard":
        assert found[0]["look-aheads"] == 0 and "graph" in found[0]["told"]
    else:
        assert found[0]["look-aheads"] >= 6 and found[0]["moved"] > 0.1 and found[0]["transitions"] >= 1


def test_a_restart_continues_bit_for_bit(ranks: list[dict[str, Any]]) -> None:
    assert [told["restart"] for told in ranks] == 2 * [{"same": True, "looked": True, "state": True}]


@pytest.mark.parametrize("rule", ["gradnorm", "uncertainty", "softadapt"])
def test_accumulated_batches(ranks: list[dict[str, Any]], rule: str) -> None:
    assert apart(rule, [told["accumulated"][rule] for told in ranks]) is None


def test_one_synchronising_backward_a_step_and_none_for_a_rejected_one(ranks: list[dict[str, Any]]) -> None:
    found = [told["synchronisations"] for told in ranks]
    assert all(told["buckets"] == [1, 1, 1, 1, 0, 1] and told["look-aheads"][0] > 0 for told in found)


@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
def test_users_who_step_themselves(ranks: list[dict[str, Any]], wrap: str) -> None:
    found = [told["own steps"][wrap] for told in ranks]
    assert all_equal(found) and found[0]["steps"] == 5 and found[0]["skipped"] == 1


def test_shadow_mode_trains_as_without_the_executor(ranks: list[dict[str, Any]]) -> None:
    assert [told["shadow"] for told in ranks] == [True, True]


def test_buckets_that_are_empty_on_one_rank(ranks: list[dict[str, Any]]) -> None:
    found = [told["buckets"] for told in ranks]
    assert all_equal(found) and found[0]["worst"] <= 1e-12


@pytest.mark.parametrize("what", ["seeds", "start weights"])
def test_ranks_that_are_not_alike_are_refused_on_all_of_them(ranks: list[dict[str, Any]], what: str) -> None:
    found = [told["refusals"][what] for told in ranks]
    assert all_equal(found) and "the ranks found different weights: make the executor alike" in found[0]


@pytest.mark.parametrize("setting", ["off", "a group of its own"])
def test_off_each_rank_finds_its_own_weights(ranks: list[dict[str, Any]], setting: str) -> None:
    # The losses are 1 + rank and 1, and the rule's weights their inverses.
    assert [told["settings"][setting] for told in ranks] == pytest.approx([1.0, 0.5])


def test_the_first_rank_s_monitor_decides(ranks: list[dict[str, Any]]) -> None:
    found = [told["decided"] for told in ranks]
    assert all_equal(found) and found[0]["a"] != found[0]["b"]


@pytest.mark.parametrize("optimizer", ["known", "not known"])
def test_a_graph_that_one_rank_loses_is_lost_on_all(ranks: list[dict[str, Any]], optimizer: str) -> None:
    assert [told["lost graph"][optimizer] for told in ranks] == 2 * [[0, 4, ["graph"]]]


def test_metrics_are_means_over_the_ranks_that_give_them(ranks: list[dict[str, Any]]) -> None:
    means = {"select_loss": 3.0, "select_accuracy": 0.625}
    assert [told["metrics"] for told in ranks] == [{**means, "other": 0.0}, {**means, "other": 1.0}]


def test_under_no_grad_nobody_is_asked(ranks: list[dict[str, Any]]) -> None:
    assert [told["settings"]["evaluated"] for told in ranks] == [[], [2.0]]


# ---- in one process -----------------------------------------------------------------------------------------------


def test_one_process_gives_back_what_it_got() -> None:
    values, there = torch.tensor([1.0, torch.nan]), torch.tensor([True, False])
    means, present = parallel.mean_where(values, there, None)
    assert means is values and present is there
    assert parallel.summed(values, None) is values and parallel.greatest(values, None) is values
    assert parallel.group_of(True) is None and parallel.size_of(None) == 1
    assert parallel.first_decides(3, None) == 3 and parallel.mean(2.5, None) == 2.5
    assert parallel.worst_norm(torch.inf, None) == torch.inf
    assert parallel.mean_metrics({"select_loss": 1.0, "other": 2.0}, None) == {"select_loss": 1.0, "other": 2.0}
    assert parallel.all_accept(values, 2, None) and not parallel.all_accept(None, 2, None)


def test_a_setting_that_is_no_group_is_refused() -> None:
    with pytest.raises(TypeError, match=r"parallel is a str: give True, False or a process group"):
        LossExecutor(WEIGHTS, parallel="gloo")  # type: ignore[arg-type]


def test_a_group_without_the_host_is_reached_by_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    host, meta = torch.device("cpu"), torch.device("meta")
    monkeypatch.setattr(parallel.dist, "get_backend_config", lambda group: "cuda:nccl")
    assert parallel._device(host, None) == torch.device("cuda")
    monkeypatch.setattr(parallel.dist, "get_backend_config", lambda group: "cpu:gloo,meta:nccl")
    assert parallel._device(host, None) == host and parallel._device(meta, None) == meta


def test_ranks_that_hang_are_killed() -> None:
    with pytest.raises(Hang, match="did not end in 1 s"):
        launch("signal:pause", 1, 1.0)


STARVED = """
import os
cores = sorted(os.sched_getaffinity(0))
for thread in os.listdir("/proc/self/task"):
    with open(f"/proc/self/task/{thread}/comm") as name:
        sends = "gloo_runloop" in name.read()
    os.sched_setaffinity(int(thread), {cores[rank % len(cores)]})
    if sends:
        os.sched_setscheduler(int(thread), os.SCHED_IDLE, os.sched_param(0))
"""
"""Gloo's own threads run where nothing else wants to: what they let go of late is let go of as the process ends."""
LINUX_ONLY = pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="needs Linux's scheduler")


@pytest.mark.parametrize("before_the_loop", ["", pytest.param(STARVED, marks=LINUX_ONLY, id="starved")])
def test_the_example_in_the_docs_runs_under_torchrun(before_the_loop: str, tmp_path: Path) -> None:
    page = (ROOT / "docs/data_parallel.md").read_text(encoding="utf-8")
    example = re.findall(r"```python\n# train\.py\n(.*?)```", page, flags=re.DOTALL)
    assert len(example) == 1 and "optimizer = " in example[0]
    file = tmp_path / "train.py"
    file.write_text(example[0].replace("optimizer = ", f"{before_the_loop}optimizer = ", 1), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(file)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, env=environment, check=False)
    assert ended.returncode == 0, ended.stderr[:4000]  # what a rank said comes before what the launcher says of it
    # Both ranks write to one pipe, so that a newline may come after the other's text.
    weights = re.findall(r"rank \d: (\{.*?\})", ended.stdout)
    assert len(weights) == 2 and weights[0] == weights[1] and "nan" not in weights[0]
