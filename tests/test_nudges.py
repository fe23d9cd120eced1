"""Nudges: masks that no state breaks, what each action does, and the decision's symmetry among the terms."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from adaptive_loss import LossMonitor
from adaptive_loss.gradients import LookAhead
from adaptive_loss.losses import Terms
from adaptive_loss.rl.nudges import KEEP, RESET, MonitorConfig, Nudges, new_network
from adaptive_loss.signals import Signals
from adaptive_loss.weighting.base import Context

CONFIG = MonitorConfig()
NAMES = ("fit", "a", "b", "c", "d", "e")


class Dice:
    """Draws of one generator."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def real(self, size: int) -> Tensor:
        return torch.rand(size, generator=self.generator, dtype=torch.float64)

    def whole(self, most: int) -> int:
        return int(torch.randint(most, (), generator=self.generator))


def drawn(dice: Dice) -> tuple[Nudges, Context]:
    """Any number of terms, base or none, anywhere in a run, after any actions, look-aheads and absences."""
    k = 1 + dice.whole(len(NAMES))
    terms = Terms(dict.fromkeys(NAMES[:k], 1.0), base="fit" if dice.whole(3) else None)
    nudges = Nudges(terms, CONFIG)
    for i in nudges.moving:
        nudges.residual[i] = CONFIG.step * (dice.whole(13) - 6)
        nudges.resting[i] = dice.whole(3)
    signals = Signals(k, 100 if dice.whole(2) else None)
    signals.step = dice.whole(121)
    gain, square = dice.real(k) - 0.5, dice.real(k)
    signals.gain, signals.gain_square = gain * square.sqrt(), square
    weights = dice.real(k) * (dice.real(k) > 0.1)
    present = dice.real(k) > 0.1
    return nudges, Context(signals.step, present, signals, weights, torch.ones(k, dtype=torch.float64))


def test_no_action_that_a_mask_allows_breaks_a_bound_in_10_000_states() -> None:
    dice, moves = Dice(0), 0
    for _ in range(10_000):
        nudges, context = drawn(dice)
        mask = nudges.mask(context)
        assert mask.shape == (nudges.n_actions,) and mask.dtype == torch.bool and bool(mask[KEEP])
        allowed = mask.nonzero().flatten().tolist()
        action = allowed[dice.whole(len(allowed))]
        progress = context.signals.progress
        quiet = progress is not None and not CONFIG.quiet_start <= progress <= 1 - CONFIG.quiet_end
        assert action == KEEP or not quiet
        before = nudges.residual.clone()
        nudges.apply(action)
        rises = nudges.residual > before
        assert float(nudges.residual.abs().max()) <= CONFIG.bound + 1e-9
        assert not bool((rises & (context.signals.t_statistic < -CONFIG.doubt)).any())
        if action > RESET:
            (moved,) = (nudges.residual != before).nonzero().flatten().tolist()
            assert moved in nudges.moving and bool(context.on[moved])
            moves += 1
    assert moves > 2000


def test_each_action_does_what_it_says() -> None:
    nudges = Nudges(Terms({"fit": 1.0, "kl": 1.0, "tv": 1.0}, base="fit"), CONFIG)
    assert [nudges.apply(action) for action in (KEEP, 2, 5)] == [None, "raise 'kl'", "lower 'tv'"]
    assert nudges.residual.tolist() == [0.0, math.log(1.25), -math.log(1.25)] and nudges.resting == [0, 2, 2]
    nudges.rest()
    assert nudges.resting == [0, 1, 1]
    assert nudges.apply(RESET) == "reset" and not nudges.residual.any() and nudges.resting == [0, 1, 1]


def test_state_round_trip() -> None:
    one, two = (Nudges(Terms({"fit": 1.0, "kl": 1.0}, base="fit"), CONFIG) for _ in range(2))
    one.apply(3)
    state = one.state_dict()
    two.load_state_dict(state)
    one.apply(3)
    one.rest()
    assert two.residual.tolist() == [0.0, -math.log(1.25)] and two.resting == [0, 2]
    assert state["residual"].tolist() == two.residual.tolist()


def decision(order: list[int], seed: int) -> str | None:
    """What a monitor with fixed networks does among the terms a … e in that order, at signals that move with them."""
    torch.manual_seed(seed)
    network = new_network(CONFIG)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    one = {name: value.unsqueeze(0) for name, value in stacked(network).items()}
    dice = Dice(seed)
    values, gains = dice.real(5) + 0.1, dice.real(5) - 0.5
    terms = Terms({"fit": 1.0} | {NAMES[1 + i]: 1.0 for i in order}, base="fit")
    monitor = LossMonitor(network=one)
    monitor.bind(terms, None, 0)
    places, fit = torch.tensor(order), torch.ones(1, dtype=torch.float64)
    signals, ones = Signals(6, None), torch.ones(6, dtype=torch.float64)
    for _ in range(3):
        signals.update(torch.cat([fit, values[places]]))
    gain = torch.cat([0 * fit, gains[places]])
    signals.look(LookAhead(gain, gain, gain, gain.abs(), 1.0, torch.eye(7, dtype=torch.float64)), 1.0)
    here = torch.ones(6, dtype=torch.bool)
    events = monitor.after_step(Context(3, here, signals, ones, ones, objective=lambda: 1.0))
    return events[0].reason if events else None


def stacked(network: torch.nn.Module) -> dict[str, Tensor]:
    """A network's parameters as one member of a stack holds them: weights [in, out], biases [1, out]."""
    return {
        name: value.detach().T.contiguous() if value.dim() == 2 else value.detach()[None]
        for name, value in network.named_parameters()
    }


def test_the_decision_follows_the_terms_in_whatever_order_they_come() -> None:
    decisions = {seed: decision([0, 1, 2, 3, 4], seed) for seed in range(25)}
    for seed, wanted in decisions.items():
        assert decision([3, 0, 4, 2, 1], seed) == wanted
    assert len(set(decisions.values())) > 5
