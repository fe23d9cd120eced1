"""Pre-training of the monitor: what it learns, that it resumes, and the evidence that lets it act."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Generator, Tensor, nn

from adaptive_loss.errors import UsageError
from adaptive_loss.loss_monitor import LossMonitor
from adaptive_loss.meta import evidence
from adaptive_loss.meta import pretrain_monitor as pretrain
from adaptive_loss.meta.episodes import Episodes
from adaptive_loss.meta.evidence import ARMS
from adaptive_loss.meta.families import families
from adaptive_loss.meta.families.base import Family, Run, Tensors
from adaptive_loss.meta.problems import Problem
from adaptive_loss.meta.rollouts import Rollout, behaviour, greedy_agent, law_beside, rollout
from adaptive_loss.meta_controller import CLIMB, RULE
from adaptive_loss.policy_files import read_policy, write_policy
from adaptive_loss.rl.nudges import N_GLOBAL, N_TERM
from adaptive_loss.trainer.simple_ablation_analysis import COLUMNS

TINY = pretrain.Flags(
    rounds=2, runs=2, updates=6, validation=2, steps=50, families=("multitask", "vae"), jobs=1, patience=9
)


def files(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in ("monitor.safetensors", "monitor.json", "curve.json")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training that nothing stopped, to be looked at only."""
    folder = tmp_path_factory.mktemp("policy")
    assert pretrain.run(replace(TINY, output_dir=folder)) == 0
    return folder


def test_same_seed_same_bytes_and_another_seed_another_policy(whole: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        assert pretrain.run(replace(TINY, seed=seed, output_dir=tmp_path / str(seed))) == 0
    again, other = files(tmp_path / "0"), files(tmp_path / "1")
    assert files(whole) == again and again["monitor.safetensors"] != other["monitor.safetensors"]
    card, network = read_policy(whole, "monitor")
    assert card["rho"] == 0.0 and card["families"] == ["multitask", "vae"] and card["stopped"] == "all rounds"
    assert [point["round"] for point in card["learning_curve"]] == [1, 2]
    monitor = LossMonitor.from_policy(whole)
    assert monitor.frozen and monitor.rho == 0.0 and monitor.config.prior_edge == 1.0
    assert all(torch.equal(monitor.network[name], value) for name, value in network.items())  # type: ignore[index]


def test_a_training_that_was_stopped_goes_on_to_the_same_files(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = replace(TINY, output_dir=tmp_path)
    one_round = pretrain.one_round

    def first_only(training: pretrain.Training, flags: pretrain.Flags) -> None:
        if training.curve:
            raise KeyboardInterrupt
        one_round(training, flags)

    monkeypatch.setattr(pretrain, "one_round", first_only)
    with pytest.raises(KeyboardInterrupt):
        pretrain.run(stopped)
    monkeypatch.setattr(pretrain, "one_round", one_round)
    pretrain.run(stopped)
    assert files(whole) == files(tmp_path)
    with pytest.raises(UsageError, match="other settings"):
        pretrain.run(replace(stopped, seed=1))


def test_the_stop_rule_ends_a_training_that_no_longer_gains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrain, "validate", lambda training, flags: {"gain": {"all": NOTHING}, "acts": 0.0})
    pretrain.run(replace(TINY, rounds=9, patience=1, families=("multitask",), output_dir=tmp_path))
    card = json.loads((tmp_path / "monitor.json").read_text())
    assert card["stopped"] == "the stop rule, after 2 rounds"


NOTHING = {"n": 2, "mean": 0.0, "interval95": None}


@pytest.mark.parametrize(
    ("flag", "value"),
    [("rounds", 0), ("runs", 0), ("updates", -1), ("validation", 1), ("patience", 0), ("steps", 30), ("seed", -1)],
)
def test_bad_flags_are_usage_errors_that_name_the_flag(flag: str, value: int, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"--{flag}"):
        pretrain.run(replace(TINY, output_dir=tmp_path / "policy", **{flag: value}))
    assert not (tmp_path / "policy").exists()


# ---- behaviours -----------------------------------------------------------------------------------------------------


def test_every_behaviour_takes_allowed_actions_only() -> None:
    agent = greedy_agent({})
    network = {name: 5 * value for name, value in agent.online.state_dict().items()}
    dice = torch.Generator().manual_seed(0)
    for name in ("keep", "random", "look_ahead", "greedy", "exploring", "shuffled"):
        choose = behaviour(name, 1, network)
        for terms in (1, 4):
            for _ in range(40):
                mask = torch.rand(2 + 2 * terms, generator=dice) < 0.4
                mask[0] = True
                assert mask[choose(torch.randn(11 + 9 * terms, generator=dice), mask)]
    with pytest.raises(ValueError, match="no behaviour 'wild'"):
        behaviour("wild", 1)


def test_a_rollout_has_a_mask_and_an_observation_more_than_actions() -> None:
    found = rollout(Problem("vae", 1, (3, 4)), ("keep", "random"), steps=50)
    decisions, runs = found.actions.shape
    assert (decisions, runs) == (4, 2) == tuple(found.rewards.shape)
    assert found.observations.shape == (5, 2, 20) and found.masks.shape == (5, 2, 4)
    assert not found.actions[:, 0].any() and not found.rewards[:-1, 0].any()
    allowed = found.masks[:-1].gather(2, found.actions[..., None])
    assert bool(allowed.all())


# ---- a family whose best schedule is known --------------------------------------------------------------------------


class Pull(Run):
    """θ pulled to where each term wants it; the objective wants what `right` wants, and `wrong` wants the opposite."""

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.zeros(4))

    def losses(self, data: Tensors, draw: Tensors) -> Tensor:
        pulls = torch.tensor([0.0, 1.0, -1.0])
        return (self.place - pulls[:, None]).square().sum(1) + 0 * draw["rows"].sum()

    def objective(self, data: Tensors, draw: Tensors) -> Tensor:
        return (self.place - 1).square().sum() + 0.1

    def judged(self, data: Tensors) -> Tensor:
        return (self.place - 1).square().sum() + 0.1


class PullFamily(Family):
    """To raise `right` and lower `wrong` as soon and as far as is allowed is best, whatever else happens."""

    name = "pull"
    terms = ("still", "right", "wrong")
    base = "still"
    customary = (1.0, 1.0, 1.0)
    is_held_apart = True

    def run(self) -> Run:
        return Pull()

    def data(self, dice: Generator) -> dict[str, Tensor]:
        return {"x": torch.zeros(1)}

    def start(self, dice: Generator) -> dict[str, float]:
        return dict.fromkeys(self.terms, 1.0)

    def learning_rate(self, dice: Generator) -> float:
        return 0.05


@pytest.fixture
def pull(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(families._objects, "pull", PullFamily)


def best_gain(steps: int) -> float:
    """What raising `right` and lowering `wrong` in turn, whenever allowed, wins over never nudging."""
    episodes = Episodes(PullFamily(torch.Generator().manual_seed(0)), [0], None, steps=steps)
    while not episodes.is_over:
        mask = episodes.masks()[0]
        episodes.act([next((action for action in (2, 5) if mask[action]), 0)])
    return float(episodes.last_gain()[0])


@pytest.mark.usefixtures("pull")
def test_a_family_whose_best_schedule_is_known_is_solved(tmp_path: Path) -> None:
    """No controller below; the look-ahead's own features show which term is right. To 95% of the best schedule."""
    steps, training = 150, pretrain.Training(0, ["pull"])
    for done in range(6):
        behaviours = pretrain.LATER if done else ("random",)
        found = rollout(
            Problem("pull", 0, tuple(range(8 * done, 8 * done + 8))), behaviours, training.network, None, steps
        )
        training.take_in("pull", found)
        training.learn(150)
    played = rollout(Problem("pull", 0, (900,)), ("greedy",), training.network, None, steps)
    assert best_gain(steps) > 0.3
    assert float(played.gains[0]) >= 0.95 * best_gain(steps)


# ---- evidence -------------------------------------------------------------------------------------------------------


def found(whole: list[float] | None, family: list[float] | None = None) -> dict:
    entries = {"all": whole, "vae": family or [-0.01, 0.1]}
    return {arm: {name: {"n": 2, "mean": 0.0, "interval95": ends} for name, ends in entries.items()} for arm in ARMS}


def test_rewards_are_learned_in_their_familys_unit_which_the_first_round_sets() -> None:
    training = pretrain.Training(0, ["pull"])
    size, n_actions = N_GLOBAL + 2 * N_TERM, 6
    seen, masks = torch.zeros(4, 2, size), torch.ones(4, 2, n_actions, dtype=torch.bool)

    def round_of(rewards: list[list[float]]) -> Rollout:
        finals = torch.zeros(2, 2)
        return Rollout(seen, torch.ones(3, 2, dtype=torch.long), torch.tensor(rewards), masks, finals)

    training.take_in("pull", round_of([[0.02, 0.0], [-0.02, 0.0], [0.08, 9.0]]))
    assert training.units == {"pull": pytest.approx(0.02)}  # the lower median of .02, .02, .08 and 9
    training.take_in("pull", round_of([[1.0, 1.0]] * 3))
    assert training.units == {"pull": pytest.approx(0.02)}
    returns = training.replays["pull"].state_dict()["columns"]["ret"]
    assert float(returns.max()) == pytest.approx(3 * pretrain.MOST_UNITS)  # 3 rewards of 50 units, each cut


def test_rho_is_earned_by_the_whole_interval_and_never_at_one_familys_cost() -> None:
    assert [evidence.earned(found(ends)) for ends in ([0.001, 0.2], [0.0, 0.2], [-0.1, -0.01], None)] == [1, 0, 0, 0]
    assert evidence.earned(found([0.001, 0.2], [-0.06, 0.3])) == 0


def test_rho_is_not_earned_against_a_real_study(tmp_path: Path) -> None:
    header = ",".join(COLUMNS)

    def study(name: str, raised: float) -> Path:
        losses = {"full": [1.0, 1.1, 1.2], "controller_only": [1.0 - raised, 1.1 - raised, 1.21 - raised]}
        lines = [
            f"{mode},{seed},ok,1,9,0.5,{loss},0.5,0,0,1.0"
            for mode, values in losses.items()
            for seed, loss in enumerate(values)
        ]
        (tmp_path / name).mkdir()
        (tmp_path / name / "ablation_results.csv").write_text("\n".join([header, *lines, ""]))
        return tmp_path / name

    harmed, won = study("harmed", 0.1), study("won", -0.1)
    assert evidence.earned({**found([0.01, 0.2]), "studies": evidence.studied([won])}) == 1
    assert evidence.earned({**found([0.01, 0.2]), "studies": evidence.studied([won, harmed])}) == 0
    rows = (won / "ablation_results.csv").read_text().replace("full,2,ok,1,9,0.5,1.2", "full,2,failed: NaN,1,9,,")
    (tmp_path / "lost.csv").write_text(rows)
    assert evidence.earned({**found([0.01, 0.2]), "studies": evidence.studied([tmp_path / "lost.csv"])}) == 0
    with pytest.raises(UsageError, match=r"--studies: .*nowhere"):
        evidence.studied([tmp_path / "nowhere"])
    (won / "ablation_results.csv").write_text(header + "\nfull,1,ok,1,9,0.5,1.0,0.5,0,0,1.0\n")
    with pytest.raises(UsageError, match="no two seeds under both"):
        evidence.studied([won])


def test_the_evidence_is_written_on_the_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, out = tmp_path / "policy", tmp_path / "out"
    pretrain.run(replace(TINY, rounds=1, output_dir=policy))
    before, trained = (policy / "monitor.safetensors").read_bytes(), read_policy(policy, "monitor")[0]
    small = ["--families", "vae", "--runs", "2", "--draws", "1", "--steps", "50", "--jobs", "1"]
    command = ["--policy", str(policy), "--output-dir", str(out)]
    assert evidence.main([*command, *small]) == 0
    assert json.loads((out / "evidence.json").read_text())["evidence"]["random"]["vae"]["n"] == 2
    assert evidence.main([*command, *small, "--write"]) == 2  # a part of the evidence earns nothing
    assert read_policy(policy, "monitor")[0]["evidence"].startswith("none yet")
    monkeypatch.setattr(evidence, "measure", lambda flags, network, law: found([0.01, 0.02]))
    assert evidence.main([*command, "--write"]) == 0
    card, _ = read_policy(policy, "monitor")
    assert card["rho"] == 1.0 and set(card["evidence"]) == {"command", *ARMS}
    assert card["trained_with"] == trained["versions"] and card["families"] == ["multitask", "vae"]
    assert LossMonitor.from_policy(policy).rho == 1.0
    assert (policy / "monitor.safetensors").read_bytes() == before
    assert json.loads((out / "evidence.json").read_text())["policy"] == card["sha256"]
    failed = {"full": 0, "controller_only": 0}
    harm = {"n_pairs": 2, "difference": 0.15, "interval95": [0.1, 0.2], "failed": failed}
    _, network = read_policy(policy, "monitor")
    write_policy(policy, "monitor", network, {**card, "evidence": {"studies": {"real": harm}}})
    assert evidence.main([*command, "--write"]) == 0  # a study that a card tells of is not forgotten
    assert read_policy(policy, "monitor")[0]["rho"] == 0.0
    write_policy(policy, "monitor", network, card)
    pretrain.run(replace(TINY, rounds=1, output_dir=policy))  # the same command again
    assert read_policy(policy, "monitor")[0]["rho"] == 1.0


def test_the_monitor_is_trained_above_the_controller_of_its_folder(tmp_path: Path) -> None:
    assert law_beside(tmp_path) == CLIMB
    card = {"families": [], "seeds": [], "evidence": "", "made_by": "", "climbs": False}
    write_policy(tmp_path, "controller", RULE.tensors(), card)
    assert law_beside(tmp_path) == RULE


def test_a_policy_without_networks_has_no_evidence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evidence.main(["--policy", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: cannot read the policy")
    assert evidence.main(["--runs", "1"]) == 2
    assert "--runs is 1; give at least 2" in capsys.readouterr().err
