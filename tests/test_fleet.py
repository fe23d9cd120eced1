"""Stacked training runs: each is what it would be alone, and under the executor."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from adaptive_loss.guards import Guards
from adaptive_loss.lookahead import Schedule
from adaptive_loss.loss_executor import LossExecutor
from adaptive_loss.meta.episodes import Episodes
from adaptive_loss.meta.families import families
from adaptive_loss.meta.families.vae import VAEFamily
from adaptive_loss.meta.fleet import Fleet, draw_family, rate_level, trained_families
from adaptive_loss.meta.stacked_optimizer import StackedOptimizer
from adaptive_loss.meta.steering import Steering
from adaptive_loss.meta_controller import CLIMB, RULE, MetaController
from adaptive_loss.rl.nudges import KEEP
from adaptive_loss.seeding import own_generator

UNGUARDED = Guards(spikes=False, share_cap=None, rate_limit=None)
SEVEN = {"classifier", "vae", "vq_adversarial", "gan", "diffusion", "pinn", "multitask"}


def trained(fleet: Fleet, steps: int) -> Fleet:
    for _ in range(steps):
        fleet.step(fleet.start)
    return fleet


def test_there_are_seven_families_to_train_on_and_one_kept_apart() -> None:
    assert set(trained_families()) == SEVEN
    assert set(families.names()) - SEVEN == {"turning"}


@pytest.mark.parametrize("name", families.names())
def test_a_family_says_what_its_runs_do(name: str) -> None:
    family = draw_family(name, 1)
    fleet = Fleet(family, [3, 4], steps=3)
    losses = fleet.losses()
    assert losses.shape == (2, len(family.terms)) == (2, len(family.customary)) and losses.requires_grad
    assert bool(losses.isfinite().all()) and bool((fleet.judged() > 0).all())
    wrong = fleet.start / torch.tensor(family.customary, dtype=torch.float64)
    assert float(wrong.min()) >= 0.1 and float(wrong.max()) <= 10
    assert not torch.equal(fleet.start[0], fleet.start[1])
    if family.base is not None:
        assert wrong[:, family.terms.index(family.base)].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("name", families.names())
def test_a_run_does_not_depend_on_its_neighbours_nor_on_the_global_generator(name: str) -> None:
    before = torch.get_rng_state()
    family = draw_family(name, 2)
    alone, beside = trained(Fleet(family, [5], 8), 8), trained(Fleet(family, [4, 5, 6], 8), 8)
    assert torch.equal(before, torch.get_rng_state())
    torch.testing.assert_close(alone.judged()[0], beside.judged()[1], rtol=1e-4, atol=1e-6)
    again = trained(Fleet(family, [4, 5, 6], 8), 8)
    assert torch.equal(beside.judged(), again.judged()) and beside.judged()[0] != beside.judged()[1]


@pytest.mark.parametrize("name", sorted(SEVEN))
def test_customary_weights_learn(name: str) -> None:
    """Not better than initialisation by a hair: by a fifth, on the mean of eight runs."""
    fleet = Fleet(draw_family(name, 0), range(8))
    before = fleet.judged().log().mean()
    weights = torch.tensor(fleet.family.customary, dtype=torch.float64).expand(8, -1)
    for _ in range(fleet.steps):
        fleet.step(weights)
    assert fleet.judged().log().mean() < before - 0.2


class Alone:
    """Run 0 of a fleet, unstacked, with torch's own optimizer under the executor."""

    def __init__(self, fleet: Fleet, law: object) -> None:
        self.fleet, family = fleet, fleet.family
        self.parameters = {name: value[0].detach().clone().requires_grad_() for name, value in fleet.parameters.items()}
        self.data = {name: value[0] for name, value in fleet.data.items()}
        weights = dict(zip(family.terms, fleet.start[0].tolist(), strict=True))
        modulators = (MetaController(law),)  # type: ignore[arg-type]
        self.executor = LossExecutor(
            weights,
            base=family.base,
            modulators=modulators,
            probe=self.objective,
            guards=UNGUARDED,
            total_steps=fleet.steps,
        )
        self.rate = float(fleet.rate[0])
        own = list(self.parameters.values())
        self.optimizer = (
            torch.optim.Adam(own, lr=self.rate)
            if family.optimizer == "adam"
            else torch.optim.SGD(own, lr=self.rate, momentum=0.9)
        )
        self.done = 0

    def call(self, what: str, drawn: dict[str, Tensor]) -> Tensor:
        draw = {name: value[self.done, 0] for name, value in drawn.items()}
        return functional_call(self.fleet._run, self.parameters, (what, self.data, draw))

    def objective(self) -> Tensor:
        return self.call("objective", self.fleet.looks)

    def step(self) -> dict[str, float]:
        self.optimizer.zero_grad()
        self.optimizer.param_groups[0]["lr"] = self.rate * rate_level(self.done, self.fleet.steps)
        losses = self.call("losses", self.fleet.draws)
        self.executor(dict(zip(self.fleet.family.terms, losses, strict=True))).backward()
        self.executor.step(self.optimizer)
        self.done += 1
        return self.executor.weights


@pytest.mark.parametrize("law", [RULE, CLIMB], ids=["rule", "law"])
@pytest.mark.parametrize(("name", "draw"), [("multitask", 0), ("vae", 1), ("diffusion", 1), ("classifier", 2)])
def test_a_row_goes_the_way_that_the_executor_goes(name: str, draw: int, law: object) -> None:
    """The environment and the loop of a user see the same signals and move the same weights."""
    family = draw_family(name, draw)
    episodes = Episodes(family, [7], law, steps=60)  # type: ignore[arg-type]
    alone = Alone(Fleet(family, [7], 60), law)
    weights = alone.executor.weights
    while not episodes.is_over:
        episodes.act([KEEP])
    for _ in range(60):
        weights = alone.step()
    steering = episodes.steered[0]
    expected = torch.tensor(list(weights.values()), dtype=torch.float64)
    torch.testing.assert_close(steering.applied, expected, rtol=2e-2, atol=0.0)
    assert steering.signals.look_aheads == alone.executor.signals.look_aheads > 12
    torch.testing.assert_close(
        steering.signals.global_features(), alone.executor.signals.global_features(), rtol=0.05, atol=0.05
    )
    assert not torch.allclose(expected, alone.fleet.start[0], rtol=0.1)  # it moved


def test_among_the_draws_is_one_with_momentum() -> None:
    assert draw_family("classifier", 2).optimizer == "momentum"


@pytest.mark.parametrize("name", ["gan", "classifier"])
def test_a_fork_that_keeps_is_the_run_itself_bit_for_bit(name: str) -> None:
    episodes = Episodes(draw_family(name, 1), [1, 2], steps=40)
    while not episodes.is_over:
        rewards = episodes.act([KEEP, KEEP])
        for value in episodes.fleet.parameters.values():
            assert torch.equal(value[:2], value[2:4])
        assert episodes.is_over or rewards.tolist() == [0.0, 0.0]
    assert rewards.tolist() == pytest.approx([0.0, 0.0], abs=1e-3)  # the third run's look-aheads may round otherwise
    assert rewards.tolist() == episodes.last_gain().tolist()


def test_a_nudge_is_paid_by_what_it_won_over_keeping_and_rests_afterwards() -> None:
    episodes = Episodes(draw_family("multitask", 0), [1, 2], steps=60)
    lower = 3
    assert episodes.masks()[:, lower].tolist() == [True, True]
    rewards = episodes.act([lower, KEEP])
    found = episodes.fleet.objective().detach().double()
    assert rewards[1] == 0 and rewards[0] == pytest.approx(float(found[2].log() - found[0].log()), abs=1e-5)
    moved = episodes.steered[0].nudges.residual
    assert moved.tolist() == pytest.approx([0, -episodes.config.step, 0, 0])
    assert episodes.masks()[:, lower].tolist() == [False, True]


def test_without_forks_an_action_is_paid_by_the_objectives_own_fall() -> None:
    episodes = Episodes(draw_family("multitask", 0), [1, 2], steps=60, forked=False)
    before = episodes.fleet.objective().detach().double()
    rewards = episodes.act([3, KEEP])
    after = episodes.fleet.objective().detach().double()
    fall = (before[:2] / after[:2]).log()
    assert rewards.tolist() == pytest.approx((fall - fall.mean()).tolist(), abs=1e-5) and rewards[0] != 0


class Scaled(VAEFamily):
    """All start weights eight times as large: the same ratios."""

    def start(self, dice: torch.Generator) -> dict[str, float]:
        return {name: 8 * weight for name, weight in super().start(dice).items()}


def test_reward_does_not_change_with_the_scale_of_the_weights() -> None:
    found = []
    for kind in (VAEFamily, Scaled):
        episodes = Episodes(kind(own_generator(1, "vae family")), [1, 2, 3], steps=60)
        assert episodes.fleet.family.optimizer == "adam"
        found.append(torch.stack([episodes.act([2, 3, 0]) for _ in range(3)]))
    assert found[0].abs().max() > 1e-4
    torch.testing.assert_close(found[0], found[1], rtol=0.05, atol=5e-4)


def test_a_lost_run_stands_still_and_leaves_its_neighbour_alone() -> None:
    values = [torch.ones(2, 3), torch.ones(2, 4)]
    optimizer = StackedOptimizer(values, torch.tensor([0.1, 0.1]), "adam")
    gradients = [torch.ones(2, 3), torch.ones(2, 4)]
    gradients[0][0, 1] = float("nan")
    optimizer.step(gradients)
    optimizer.step([torch.ones(2, 3), torch.ones(2, 4)])
    assert optimizer.lost.tolist() == [True, False]
    assert values[0][0].tolist() == [1.0] * 3 and values[1][0].tolist() == [1.0] * 4
    assert values[0][1].tolist() == pytest.approx([0.8] * 3)


@pytest.mark.parametrize("kind", ["adam", "momentum"])
def test_the_stacked_optimizer_is_torchs_own_row_by_row(kind: str) -> None:
    dice = torch.Generator().manual_seed(0)
    rates = torch.tensor([0.1, 0.01])
    stacked = torch.randn(2, 5, generator=dice)
    alone = [row.clone().requires_grad_() for row in stacked]
    kinds = {"adam": torch.optim.Adam, "momentum": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9)}
    theirs = [kinds[kind]([row], lr=float(rate)) for row, rate in zip(alone, rates, strict=True)]
    ours = StackedOptimizer([stacked], rates, kind)
    for _ in range(7):
        gradient = torch.randn(2, 5, generator=dice)
        ours.step([gradient])
        for row, optimizer, part in zip(alone, theirs, gradient, strict=True):
            row.grad = part.clone()
            optimizer.step()
    torch.testing.assert_close(stacked, torch.stack([row.detach() for row in alone]))


def test_a_steering_without_law_holds_its_start_weights() -> None:
    steering = Steering({"reconstruction": 1.0, "kl": 3.0}, VAEFamily, None, 10)
    before = copy.deepcopy(steering.weights())
    assert before.tolist() == [1.0, 3.0] and steering.controller is None
    steering.nudges.apply(2)
    assert steering.weights().tolist() == pytest.approx([1.0, 3.75])
    assert steering.weights(torch.zeros(2, dtype=torch.float64)).tolist() == [1.0, 3.0]


def test_a_pinned_term_is_no_action_and_a_lost_run_is_lost_for_good() -> None:
    episodes = Episodes(draw_family("vq_adversarial", 1), [1], steps=40)
    assert episodes.masks().shape == (1, 6)  # perceptual and adversarial may move
    episodes.fleet.optimizer.lost[0] = True
    assert episodes.fleet.judged()[0] == torch.inf and episodes.last_gain().tolist() == [-1.0]


def test_decisions_come_where_a_run_of_that_length_has_its_own() -> None:
    episodes = Episodes(draw_family("multitask", 0), [1], steps=60)
    assert episodes.every == 10 and episodes.fleet.done == 10
    assert Episodes(draw_family("multitask", 0), [1], RULE, steps=60).steered[0].schedule == Schedule()
