"""A monitor with trained networks: what it loads and refuses, that it is frozen unless asked, and that it resumes."""

from __future__ import annotations

import copy
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from toy import WEIGHTS, Run, train

from adaptive_loss import LossExecutor, LossMonitor, cli
from adaptive_loss.data import datasets
from adaptive_loss.gradients import LookAhead
from adaptive_loss.loss_monitor import MonitorConfig
from adaptive_loss.losses import Terms
from adaptive_loss.meta.evidence import earned
from adaptive_loss.meta_controller import CLIMB, RULE, MetaController
from adaptive_loss.policy_files import POLICIES, read_policy, write_policy
from adaptive_loss.rl.networks import stack
from adaptive_loss.rl.nudges import new_network
from adaptive_loss.signals import Signals
from adaptive_loss.trainer.training import prepare
from adaptive_loss.utils.config import RunConfig, from_json, to_json
from adaptive_loss.weighting.base import Context

TOLD: dict[str, Any] = {"families": ["toy"], "seeds": [0], "evidence": "none", "made_by": "a test"}


def networks(count: int = 3, scale: float = 0.3, seed: int = 0) -> dict[str, Tensor]:
    """Networks that have an opinion, alike but for a little."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        whole = stack([new_network(MonitorConfig())] * count).state_dict()
        return {
            name: t[:1] + scale * torch.randn(t[:1].shape) + 0.01 * torch.randn(t.shape) for name, t in whole.items()
        }


NETWORKS = networks()


def policy(folder: Path, tensors: dict[str, Tensor] = NETWORKS, **changes: Any) -> Path:
    write_policy(folder, "monitor", tensors, TOLD | {"rho": 0.5} | changes)
    write_policy(folder, "controller", RULE.tensors(), TOLD | {"climbs": False})
    return folder


def monitor_of(run: Run) -> LossMonitor:
    (monitor,) = run.executor.modulators
    assert isinstance(monitor, LossMonitor)
    return monitor


def actions(run: Run) -> list[tuple[int, str]]:
    return [(event.step, event.reason) for event in run.events if event.kind == "action"]


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


# ---- loading --------------------------------------------------------------------------------------------------------


def test_a_policy_s_networks_and_rho_are_loaded(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    monitor = LossMonitor.from_policy(policy(tmp_path))
    assert torch.equal(before, torch.get_rng_state())
    assert monitor.rho == 0.5 and monitor.frozen
    assert LossMonitor.from_policy(tmp_path, rho=1.0).rho == 1.0
    assert not LossMonitor.from_policy(tmp_path, online=True).frozen
    monitor.bind(Terms(WEIGHTS, "fit"), 100, 7)
    assert same(dict(monitor.agent.online.state_dict()), NETWORKS)
    assert same(dict(monitor.agent.target.state_dict()), NETWORKS)


@pytest.mark.parametrize("count", [1, 5])
def test_any_number_of_networks_and_terms_is_served(count: int) -> None:
    monitor = LossMonitor(network=networks(count))
    monitor.bind(Terms(dict.fromkeys("abcdefg", 1.0), "a"), 100, 0)
    assert monitor.agent.q_values(torch.zeros(11 + 6 * 9)).shape == (count, 14)


def test_the_shipped_policy_has_trained_networks_and_the_strength_that_its_evidence_allows() -> None:
    monitor, (card, network) = LossMonitor.from_policy(None), read_policy(POLICIES, "monitor")
    assert monitor.frozen and monitor.network is not None and set(monitor.network) == set(network)
    assert monitor.rho == card["rho"] == earned(card["evidence"])


NAME = "term_hidden.weight"
FOREIGN: dict[str, Callable[[], dict[str, Tensor]]] = {
    "one too few": lambda: {name: t for name, t in NETWORKS.items() if name != NAME},
    "one too many": lambda: NETWORKS | {"more": torch.zeros(3, 1)},
    "another width": lambda: NETWORKS | {NAME: torch.zeros(3, 64, 32)},
    "members that differ": lambda: NETWORKS | {NAME: NETWORKS[NAME][:2]},
    "double precision": lambda: NETWORKS | {NAME: NETWORKS[NAME].double()},
    "not finite": lambda: NETWORKS | {NAME: NETWORKS[NAME] * math.nan},
    "numbers alone": lambda: {NAME: torch.zeros(())},
    "too many": lambda: networks(65),
    "countless and empty": lambda: {NAME: torch.zeros(1 << 30, 0)},
}


@pytest.mark.parametrize("what", FOREIGN)
def test_foreign_networks_are_refused_in_one_line(tmp_path: Path, what: str) -> None:
    with pytest.raises(ValueError, match=r"cannot read the policy .*monitor\.(json|safetensors): ValueError") as caught:
        LossMonitor.from_policy(policy(tmp_path, FOREIGN[what]()))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_another_policy_s_state_is_refused_by_what_it_is() -> None:
    def executor(monitor: LossMonitor) -> LossExecutor:
        return LossExecutor({"a": 1.0, "b": 1.0}, base="a", modulators=[monitor], probe=lambda: torch.ones(()))

    saved = executor(LossMonitor(network=networks(5))).state_dict()
    executor(LossMonitor(network=NETWORKS | networks(5))).load_state_dict(saved)
    for other in (LossMonitor(), LossMonitor(network=NETWORKS), LossMonitor(network=networks(5), online=True)):
        with pytest.raises(ValueError, match="its modulators are 'LossMonitor of 5 trained networks, frozen'"):
            executor(other).load_state_dict(saved)


# ---- frozen ---------------------------------------------------------------------------------------------------------


def test_frozen_it_is_deterministic_whatever_the_seed_and_learns_nothing() -> None:
    runs = [train([LossMonitor(network=NETWORKS)], steps=200, seed=seed) for seed in (0, 0, 1)]
    assert actions(runs[0]) and actions(runs[0]) == actions(runs[1]) == actions(runs[2])
    assert torch.equal(runs[0].parameters, runs[2].parameters)
    monitor = monitor_of(runs[0])
    statistics = monitor.statistics()
    assert statistics["transitions"] == statistics["updates"] == 0 and same(
        dict(monitor.agent.online.state_dict()), NETWORKS
    )


def test_other_networks_act_otherwise() -> None:
    paths = {tuple(actions(train([LossMonitor(network=networks(seed=seed))], steps=200))) for seed in range(4)}
    assert len(paths) == 4


def test_frozen_it_never_reads_the_objective() -> None:
    monitor = LossMonitor(network=NETWORKS)
    monitor.bind(Terms(WEIGHTS, "fit"), None, 0)
    signals, ones = Signals(3, None), torch.ones(3, dtype=torch.float64)
    for step in range(1, 200):
        signals.update(torch.rand(3, dtype=torch.float64))
        here = torch.ones(3, dtype=torch.bool)
        monitor.after_step(Context(step, here, signals, ones, ones, objective=lambda: pytest.fail("read")))
    assert monitor.suggestions


def test_frozen_it_chooses_as_its_agent_would_also_by_networks_that_a_state_brings() -> None:
    def bound(seed: int) -> LossMonitor:
        monitor = LossMonitor(network=networks(seed=seed))
        monitor.bind(Terms(WEIGHTS, "fit"), 100, 0)
        return copy.deepcopy(monitor)

    monitor, saved, dice = bound(0), bound(1).state_dict(), torch.Generator().manual_seed(0)
    mask, chosen = torch.ones(6, dtype=torch.bool), set()
    for _ in range(2):
        seen = torch.randn(40, 11 + 2 * 9, generator=dice)
        actions = [monitor._choose(one, mask) for one in seen]
        assert actions == [monitor.agent.act(one, mask, explore=False) for one in seen]
        chosen |= set(actions)
        monitor.load_state_dict(saved)
    assert len(chosen) > 2


def test_where_the_networks_disagree_it_keeps() -> None:
    one, other = networks(1, scale=2.0, seed=1), networks(1, scale=2.0, seed=2)
    torn = {name: torch.cat([one[name], other[name]]) for name in one}
    # Of opposite opinions about every move: its mean is 0, and the lower bound below it.
    for name in ("common_out.weight", "common_out.bias", "move_out.weight", "move_out.bias"):
        torn[name] = torch.cat([one[name], -one[name]])
    for name in set(torn) - {"common_out.weight", "common_out.bias", "move_out.weight", "move_out.bias"}:
        torn[name] = torch.cat([one[name], one[name]])
    sure = {name: torch.cat([t, t]) for name, t in one.items()}
    config = MonitorConfig(prior_edge=1.0)  # no prior
    assert actions(train([LossMonitor(config=config, network=sure)], steps=200))
    assert not actions(train([LossMonitor(config=config, network=torn)], steps=200))


def test_rho_0_with_a_policy_changes_nothing_and_tells_what_it_would_do() -> None:
    silent, nothing = train([LossMonitor(rho=0.0, network=NETWORKS)], steps=150), train([], steps=150)
    assert torch.equal(silent.parameters, nothing.parameters) and silent.weights == nothing.weights
    summary = monitor_of(silent).summary()
    told = [reason for _, reason in actions(silent)]
    assert summary["suggestions"] == {reason: told.count(reason) for reason in sorted(set(told))} and told
    assert summary["rho"] == 0.0 and any(summary["residual"].values()) and json.dumps(summary)


# ---- online ---------------------------------------------------------------------------------------------------------


def test_online_it_learns_on_from_the_policy_and_explores_but_in_the_quiet_parts() -> None:
    runs = [train([LossMonitor(network=NETWORKS, online=True)], steps=400, seed=seed) for seed in (0, 1)]
    assert actions(runs[0]) != actions(runs[1])
    for run in runs:
        monitor, steps = monitor_of(run), [step for step, _ in actions(run)]
        assert monitor.statistics()["updates"] > 50 and not same(dict(monitor.agent.online.state_dict()), NETWORKS)
        assert min(steps) >= 20 and max(steps) <= 340


# ---- resume ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("online", [False, True])
def test_resume_is_bit_exact(online: bool) -> None:
    dice = torch.Generator().manual_seed(0)

    def drive(monitor: LossMonitor, signals: Signals, decisions: int) -> list[str]:
        reasons, ones = [], torch.ones(3, dtype=torch.float64)
        for _ in range(10 * decisions):
            signals.update(torch.rand(3, generator=dice, dtype=torch.float64))
            gain = torch.rand(3, generator=dice, dtype=torch.float64) - 0.5
            signals.look(LookAhead(gain, gain, gain, gain.abs(), 1.0, torch.eye(4, dtype=torch.float64)), 1.0)
            context = Context(signals.step, torch.ones(3, dtype=torch.bool), signals, ones, ones, objective=lambda: 1.0)
            reasons += [event.reason for event in monitor.after_step(context)]
        return reasons

    def fresh() -> tuple[LossMonitor, Signals]:
        monitor = LossMonitor(network=NETWORKS, online=online)
        monitor.bind(Terms(WEIGHTS, "fit"), None, 3)
        return monitor, Signals(3, None)

    one, signals = fresh()
    drive(one, signals, 20)
    buffer = io.BytesIO()
    torch.save([one.state_dict(), signals.state_dict(), dice.get_state()], buffer)
    buffer.seek(0)
    state, seen, draws = torch.load(buffer, weights_only=True)
    wanted = drive(one, signals, 25)
    two, signals = fresh()
    two.load_state_dict(state)
    signals.load_state_dict(seen)
    dice.set_state(draws)
    assert drive(two, signals, 25) == wanted and wanted
    assert torch.equal(one.nudges.residual, two.nudges.residual) and one.summary() == two.summary()


# ---- on the command line --------------------------------------------------------------------------------------------


def test_modes_take_the_policy_of_a_run(tmp_path: Path) -> None:
    config = RunConfig(dataset="digits", subset=200, epochs=1, batch_size=32, policy=policy(tmp_path))
    data = datasets.get("digits")(config.data_dir, seed=0, subset=200)
    laws = {}
    trained = {"adaptive", "full", "monitor_only"}
    for mode in (*trained, "controller_only", "random_monitor", "lookahead_only"):
        modulators = prepare(from_json({**to_json(config), "mode": mode}), data).executor.modulators
        laws[mode] = [m.law for m in modulators if isinstance(m, MetaController)]
        monitors = [m for m in modulators if isinstance(m, LossMonitor)]
        assert [m.rho for m in monitors] == [0.5 if mode == "adaptive" else 1.0] * len(monitors)
        assert all(m.frozen == (mode in ("adaptive", "full")) for m in monitors)
        assert all((m.network is not None) == (mode in trained) for m in monitors)
    assert laws.pop("monitor_only") == [] and all(law == [RULE] for law in laws.values())
    own = prepare(from_json({**to_json(config), "mode": "controller_only", "policy": None}), data).executor.modulators
    assert [m.law for m in own if isinstance(m, MetaController)] == [CLIMB]


def test_a_configuration_with_a_policy_survives_its_file(tmp_path: Path) -> None:
    config = RunConfig(policy=tmp_path)
    assert from_json(json.loads(json.dumps(to_json(config)))) == config
    assert from_json({}).policy is None


COMMANDS = {
    "train": ["train", "classify", "--adaptive"],
    "compare": ["compare", "classify", "--weightings", "fixed", "adaptive"],
    "ablate": ["ablate"],
    "phase1": ["phase1"],
    "arena": ["arena", "--tasks", "classify", "--weightings", "adaptive"],
}
REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (lambda p: p.rmdir(), "is no folder; give the one that holds"),
    "an empty folder": (lambda p: None, "cannot read the policy"),
    "foreign networks": (lambda p: policy(p, FOREIGN["another width"]()), "its tensor 'term_hidden.weight' is"),
    "other signals": (lambda p: policy(p, signals_version=99), "was made for signals version 99"),
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_policy_that_is_refused_is_one_line_before_anything_is_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str, what: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    make, says = REFUSED[what]
    make(tmp_path / "mine")
    there = sorted(tmp_path.rglob("*"))
    assert cli.main([*COMMANDS[command], "--dataset", "digits", "--policy", "mine", "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1 and sorted(tmp_path.rglob("*")) == there
    assert cli.main([*COMMANDS[command], "--dataset", "digits", "--policy", "mine"]) == 2
    assert sorted(tmp_path.rglob("*")) == there
