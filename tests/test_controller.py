"""The controller's law: identities, the rule by hand, what it does to a harmful term, and its files."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from toy import WEIGHTS, train

from adaptive_loss import LossExecutor, MetaController
from adaptive_loss import signals as signal
from adaptive_loss.gradients import LookAhead, look_ahead
from adaptive_loss.guards import REACH, Guards
from adaptive_loss.losses import Terms
from adaptive_loss.meta_controller import CLIMB, RULE, ZERO, ControllerLaw
from adaptive_loss.policy_files import POLICIES, write_policy
from adaptive_loss.signals import Signals
from adaptive_loss.weighting.base import Context

BUSY = replace(RULE, drift=(0.1, -0.2, 0.3, 0.05, -0.1, 0.2), features=(0.3,) * 9, late_features=(-0.2,) * 9)


def test_a_zero_law_is_no_modulator_bit_for_bit() -> None:
    zero, nothing = train([MetaController(ZERO)]), train([])
    assert torch.equal(zero.parameters, nothing.parameters)
    assert zero.weights == nothing.weights
    assert zero.looks  # it did look
    assert not zero.events


def test_a_zero_law_is_no_modulator_where_there_is_no_base() -> None:
    weights = {"fit": 0.3, "helpful": 1.7, "harmful": 0.1}
    zero, nothing = train([MetaController(ZERO)], base=None, weights=weights), train([], base=None, weights=weights)
    assert torch.equal(zero.parameters, nothing.parameters)


def test_the_rule_by_hand_from_the_recorded_look_aheads() -> None:
    run = train([MetaController(RULE)], steps=120)
    edge = 30  # a quarter of 120 steps, below 50
    mean = square = torch.zeros(3, dtype=torch.float64)
    log = torch.zeros(3, dtype=torch.float64)
    path = {}
    for step, look in run.looks:
        mean, square = 0.8 * mean + 0.2 * look.gain, 0.8 * square + 0.2 * look.gain**2
        trust = mean / square.sqrt()
        trust = trust - (look.share > look.share[0]) * trust[0]
        move = (0.7 if step <= edge else 0.35) * trust.clamp(-1, 1)
        move[0] = 0  # the base stays put
        log = log + move
        path[step] = log
    assert len(path) == 32
    controller = run.executor.modulators[0]
    assert controller.gains().tolist() == pytest.approx(log.tolist(), abs=1e-12)
    # A step's weights follow the look-aheads before it, unless a guard (a nat a step, the share cap) holds them.
    held = [event for event in run.events if event.kind == "clamp"]
    for step in (1, 3, 10) if held else path:
        before = [log for at, log in path.items() if at < step]
        wanted = before[-1] if before else torch.zeros(3, dtype=torch.float64)
        assert list(run.weights[step].values()) == pytest.approx(wanted.exp().tolist(), rel=1e-9)


def test_a_harmful_term_falls_more_than_tenfold_and_a_helpful_one_does_not() -> None:
    run = train([MetaController(RULE)], steps=300)
    final = run.executor.weights
    assert final["fit"] == 1.0
    assert final["harmful"] < 0.1
    assert final["helpful"] > 0.1
    assert final["helpful"] > 10 * final["harmful"]


def test_without_a_base_the_weights_keep_their_sum() -> None:
    run = train([MetaController(RULE)], base=None)
    assert all(sum(w.values()) == pytest.approx(3.0) for w in run.weights)
    assert run.executor.weights["harmful"] < 0.3


def test_a_whole_start_scale_changes_nothing_but_the_scale() -> None:
    one = train([MetaController(BUSY)], steps=60)
    other = train([MetaController(BUSY)], steps=60, weights={name: 8 * w for name, w in WEIGHTS.items()})
    # Adam's ε alone breaks the symmetry.
    for name, weight in one.executor.weights.items():
        assert other.executor.weights[name] == pytest.approx(8 * weight, rel=1e-3)


def controller_at(
    law: ControllerLaw, names: tuple[str, ...] = ("a", "b", "c"), base: str | None = "a"
) -> MetaController:
    controller = MetaController(law)
    controller.bind(Terms(dict.fromkeys(names, 1.0), base), 100, 0)
    return controller


def context_of(signals: Signals, k: int = 3, *, looked: bool = True, present: Tensor | None = None) -> Context:
    ones = torch.ones(k, dtype=torch.float64)
    here = torch.ones(k, dtype=torch.bool) if present is None else present
    return Context(signals.step, here, signals, ones, ones, looked, lambda: 1.0)


def looked(gain: list[float], share: list[float] | None = None) -> Signals:
    signals = Signals(len(gain), 100)
    values = torch.tensor(gain, dtype=torch.float64)
    shares = torch.full_like(values, 1 / len(gain)) if share is None else torch.tensor(share, dtype=torch.float64)
    signals.update(torch.rand(len(gain), generator=torch.Generator().manual_seed(3), dtype=torch.float64))
    signals.look(LookAhead(values, values / 2, values / 3, shares, 1.0, torch.eye(len(gain) + 1)), 1.0)
    return signals


def test_calibration_makes_weighted_gradients_as_long_as_the_bases_once() -> None:
    controller = controller_at(replace(RULE, gain=0.0, calibration=1.0))
    signals = looked([0.0, 0.0, 0.0], [0.1, 0.5, 0.4])
    controller.after_step(context_of(signals))
    assert controller.gains().tolist() == pytest.approx([0, -math.log(5), -math.log(4)])
    signals.look(
        LookAhead(*(torch.zeros(3, dtype=torch.float64),) * 3, torch.tensor([0.1, 0.8, 0.1]), 1.0, torch.eye(4)), 1.0
    )
    controller.after_step(context_of(signals))
    assert controller.gains().tolist() == pytest.approx([0, -math.log(5), -math.log(4)])


def test_a_term_that_outgrew_the_base_must_do_better_than_it() -> None:
    """On CIFAR-10 a term that held nearly the whole gradient went on rising, at ten points of accuracy."""
    gain = [0.4, 0.4, -0.4]
    trust = math.sqrt(0.2)  # of a first look-ahead: 0.2h/√(0.2h²)
    small, grown = [0.5, 0.3, 0.2], [0.2, 0.5, 0.3]
    wanted = {
        (0.0, 0): [0, 0.7 * trust, -0.7 * trust],
        (0.0, 1): [0, 0.7 * trust, -0.7 * trust],
        (1.0, 0): [0, 0.7 * trust, -0.7 * trust],
        (1.0, 1): [0, 0, -0.7 * min(1, 2 * trust)],
    }
    for (against, place), moves in wanted.items():
        controller = controller_at(replace(RULE, against_base=against))
        controller.after_step(context_of(looked(gain, (small, grown)[place])))
        assert controller.gains().tolist() == pytest.approx(moves)
    free = controller_at(RULE, base=None)
    free.after_step(context_of(looked(gain, grown)))
    assert free.gains().tolist() == pytest.approx([0.7 * trust, 0.7 * trust, -0.7 * trust])


def test_permuting_the_auxiliaries_permutes_the_moves() -> None:
    order = [0, 3, 1, 2]
    gain, share = [0.1, -0.4, 0.3, 0.9], [0.4, 0.3, 0.2, 0.1]
    law = replace(BUSY, calibration=0.5)
    one, other = controller_at(law, tuple("abcd")), controller_at(law, tuple("adbc"))
    signals, permuted = looked(gain, share), looked([gain[i] for i in order], [share[i] for i in order])
    entries = [4 * kind + i for kind in range(3) for i in order] + [12, 13]
    for name in ("sum", "weight"):
        setattr(permuted.averages, name, getattr(signals.averages, name)[entries])
    permuted.first = signals.first[order]
    one.after_step(context_of(signals, 4))
    other.after_step(context_of(permuted, 4))
    assert one.gains().abs().sum() > 0
    torch.testing.assert_close(one.gains()[order], other.gains(), rtol=1e-12, atol=1e-12)


def test_absent_and_fixed_terms_stay_and_the_reach_holds() -> None:
    controller = controller_at(replace(RULE, early_step=1.4, late_step=1.4, drift=(0.0,) * 5 + (-50.0,)))
    signals = looked([0.5, 0.5, 0.5])
    for _ in range(20):
        controller.after_step(context_of(signals, present=torch.tensor([True, True, False])))
    assert controller.gains().tolist() == [0.0, REACH, 0.0]


def test_after_a_step_without_a_look_ahead_nothing_moves() -> None:
    controller = controller_at(BUSY)
    assert controller.after_step(context_of(looked([0.5] * 3), looked=False)) == []
    assert controller.gains().tolist() == [0.0] * 3


def test_without_a_probe_it_acts_every_200_steps() -> None:
    with pytest.warns(UserWarning, match="no probe"):
        run = train([MetaController(BUSY)], steps=450, probe=False)
    assert [event.step for event in run.events if event.kind == "controller"] == [200, 400]
    assert run.weights[200] != WEIGHTS and run.weights[199] == WEIGHTS


def test_without_a_probe_told_of_epochs_it_acts_at_their_ends() -> None:
    with pytest.warns(UserWarning, match="no probe"):
        run = train([MetaController(BUSY)], steps=450, probe=False, epoch=150)
    assert [event.step for event in run.events if event.kind == "controller"] == [150, 300, 450]


def test_with_a_probe_the_end_of_an_epoch_moves_nothing() -> None:
    assert train([MetaController(BUSY)], epoch=10).weights == train([MetaController(BUSY)]).weights


def test_the_rule_without_a_probe_is_the_start_weights() -> None:
    with pytest.warns(UserWarning, match="no probe"):
        run = train([MetaController(RULE)], steps=250, probe=False)
    assert all(w == WEIGHTS for w in run.weights) and not run.events


def test_events_tell_the_change_that_was_made() -> None:
    run = train([MetaController(RULE)])
    changes = [event.details["change"] for event in run.events if event.kind == "controller"]
    assert sum(c["harmful"] for c in changes) == pytest.approx(float(run.executor.modulators[0].gains()[2]))
    assert all(c["fit"] == 0 for c in changes)


def test_state_round_trip() -> None:
    run = train([MetaController(BUSY)], steps=40)
    state = run.executor.modulators[0].state_dict()
    again = controller_at(BUSY, tuple(WEIGHTS), "fit")
    again.load_state_dict(state)
    assert again.state_dict()["last_action"] == state["last_action"] > 0
    assert torch.equal(again.gains(), run.executor.modulators[0].gains())
    assert again.met.all()


# ---- a term that comes in mid-run -----------------------------------------------------------------------------------


def arrival(law: ControllerLaw, size: float, steps: int = 120, at: int = 100) -> list[float]:
    """The weight, by step, of a term that comes at step ``at`` with a gradient of ``size`` times the base's."""
    p = torch.nn.Parameter(torch.zeros(8, dtype=torch.float64))
    goal = torch.linspace(1.0, 2.0, 8, dtype=torch.float64)
    executor = LossExecutor(
        {"fit": 1.0, "late": 1.0},
        base="fit",
        modulators=[MetaController(law)],
        probe=lambda: (p - goal).square().sum(),
        total_steps=400,
        guards=Guards(rate_limit=None, spikes=False),
    )
    optimizer, weights = torch.optim.SGD([p], lr=1e-5), []
    for step in range(steps):
        optimizer.zero_grad()
        losses = {"fit": (p - goal).square().sum()}
        if step >= at:
            losses["late"] = size * (p + goal.flip(0)).square().sum()
        executor(losses).backward()
        executor.step(optimizer)
        weights.append(executor.weights["late"])
    return weights


def test_a_term_that_comes_late_and_pulls_harder_than_the_base_is_lowered_to_it_at_once() -> None:
    """A discriminator's gradient, 62 times the reconstruction's, undid a quarter of a run within an epoch."""
    weights = arrival(CLIMB, 50.0)
    assert set(weights[:102]) == {1.0}  # one step to meet it, one to look ahead
    assert weights[102] < 1.01 / 50
    assert weights[-1] < weights[102]  # and its own early look-aheads go on from there


def test_a_late_term_that_pulls_less_than_the_base_enters_at_its_weight() -> None:
    assert arrival(CLIMB, 0.5, steps=103)[102] == pytest.approx(1.0, abs=0.05)


def test_the_plain_rule_welcomes_nobody() -> None:
    assert arrival(RULE, 50.0, steps=103)[102] > 0.1


def test_a_late_term_has_early_steps_and_the_others_have_not() -> None:
    controller = MetaController(replace(CLIMB, late_step=0.0, late_band=0.0))
    controller.bind(Terms({"a": 1.0, "b": 1.0, "c": 1.0}, "a"), 1000, 0)
    signals = looked([0.0, -0.5, -0.5])
    signals.arrivals, signals.step = torch.tensor([0.0, 0.0, 300.0], dtype=torch.float64), 305
    sizes = controller._by_age(context_of(signals), "step")
    assert sizes.tolist() == [0.0, 0.0, 1.4]


# ---- a law that climbs ----------------------------------------------------------------------------------------------


def climb(
    wanted: list[float], start: list[float], looks: int, noise: float, law: ControllerLaw = CLIMB, seed: int = 0
) -> list[list[float]]:
    """Weights after each look-ahead, where the probe's gradient is Σ wantedᵢgᵢ with noise, the first term the base."""
    names, dice = tuple("abcdef"[: len(wanted)]), torch.Generator().manual_seed(seed)
    controller = MetaController(law)
    controller.bind(Terms(dict(zip(names, start, strict=True)), "a"), 1000, 0)
    signals, weights = Signals(len(start), 1000), torch.tensor(start, dtype=torch.float64)
    path = []
    for _ in range(looks):
        terms = torch.randn(len(wanted), 40, generator=dice, dtype=torch.float64)
        probe = torch.tensor(wanted, dtype=torch.float64) @ terms
        probe = probe + noise * probe.norm() / math.sqrt(40) * torch.randn(40, generator=dice, dtype=torch.float64)
        vectors = torch.cat([terms, probe[None]])
        signals.update(torch.ones(len(start), dtype=torch.float64))
        signals.look(look_ahead(vectors @ vectors.T, weights, 0, 1.0), 1.0)
        first = torch.tensor(start, dtype=torch.float64)
        controller.after_step(Context(signals.step, weights > 0, signals, weights, first, True, lambda: 1.0))
        weights = first * controller.gains().exp()
        path.append(weights.tolist())
    return path


@pytest.mark.parametrize("start", [0.01, 0.1, 10.0, 100.0])
def test_it_climbs_to_the_right_weight_and_does_not_overshoot(start: float) -> None:
    path = [weights[1] for weights in climb([1.0, 1.0], [1.0, start], 24, noise=0.0)]
    side = [math.log(weight) * math.copysign(1, math.log(start)) for weight in path]
    assert abs(side[-1]) < 0.25 and min(side) > -0.25
    plain = [weights[1] for weights in climb([1.0, 1.0], [1.0, start], 24, noise=0.0, law=RULE)]
    assert min(math.log(w) * math.copysign(1, math.log(start)) for w in plain) < -0.4  # the rule does


def test_from_right_weights_it_walks_less_with_the_noise_than_the_rule() -> None:
    def farthest(law: ControllerLaw) -> float:
        paths = [climb([1.0, 2.0, 0.5], [1.0, 2.0, 0.5], 32, noise=3.0, law=law, seed=seed) for seed in range(8)]
        return max(abs(math.log(path[-1][i] / right)) for path in paths for i, right in ((1, 2.0), (2, 0.5)))

    assert 2 * farthest(CLIMB) < farthest(RULE)


def test_right_weights_without_noise_stay() -> None:
    (*_, last) = climb([1.0, 2.0, 0.5], [1.0, 2.0, 0.5], 12, noise=0.0)
    assert last == pytest.approx([1.0, 2.0, 0.5], rel=1e-2)


def test_a_term_longer_than_the_base_is_raised_to_its_start_weight_at_most() -> None:
    """What undoes the last steps looks good to a look-ahead of one step, at any weight."""
    (*_, from_right) = climb([0.001, 1.0], [1.0, 1.0], 32, noise=0.0)
    assert from_right[1] < 1.7  # as long as the base, and one part of a move beyond
    (*_, from_high) = climb([0.001, 1.0], [1.0, 50.0], 32, noise=0.0)
    assert from_high[1] == pytest.approx(50.0)


def test_moves_by_hand() -> None:
    # g_a, g_b of length 1 and orthogonal, g_p = g_a: h_b = −s/(1 + s²) with s = w_b/w_a, so that after n equal
    # look-aheads t_b = −√(1 − 0.8ⁿ) at any weight: −0.447 says nothing yet, −0.6 does, in all eight parts.
    vectors = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    controller = controller_at(replace(CLIMB, against_base=0.0), ("a", "b"))
    signals = Signals(2, 100)
    signals.update(torch.ones(2, dtype=torch.float64))
    for wanted in (0.0, -1.4 * (0.6 - 0.55) / 0.45):
        signals.look(look_ahead(vectors @ vectors.T, torch.ones(2, dtype=torch.float64), 0, 1.0), 1.0)
        controller.after_step(context_of(signals, 2))
        assert controller.gains().tolist() == pytest.approx([0.0, wanted])


def test_a_pinned_term_stays_where_it_is_and_the_others_move() -> None:
    weights = train([MetaController(CLIMB)], pinned=["harmful"]).weights
    assert {step["harmful"] for step in weights} == {1.0} == {step["fit"] for step in weights}
    assert weights[-1]["helpful"] != 1.0


def test_a_harmful_term_falls_and_the_base_stays_under_a_law_that_climbs() -> None:
    run = train([MetaController(CLIMB)], steps=300)
    assert run.executor.weights["fit"] == 1.0 and run.executor.weights["harmful"] < 0.1
    assert run.executor.schedule.early_steps == 16


# ---- the law's vector and its file ----------------------------------------------------------------------------------


def test_vector_round_trip_has_30_to_100_parameters() -> None:
    vector = [float(i) for i in range(len(RULE.to_vector()))]
    assert 30 <= len(vector) <= 100
    assert RULE.with_vector(vector).to_vector() == vector
    assert CLIMB.with_vector(CLIMB.to_vector()) == CLIMB and RULE.with_vector(CLIMB.to_vector()) == replace(
        CLIMB, climbs=False
    )


def written(folder: Path, tensors: Mapping[str, Tensor] | None = None, **changes: Any) -> Path:
    """A policy folder with the law BUSY, or what it has been changed to."""
    told = {"families": [], "seeds": [], "evidence": "", "made_by": "", "climbs": False}
    write_policy(folder, "controller", BUSY.tensors() if tensors is None else tensors, told | changes)
    return folder


def test_a_law_survives_its_files(tmp_path: Path) -> None:
    assert ControllerLaw.load(written(tmp_path) / "controller.json") == BUSY
    assert MetaController.from_policy(tmp_path).law == BUSY
    assert MetaController.from_policy(written(tmp_path, climbs=True)).law == replace(BUSY, climbs=True)


def test_the_shipped_law_is_the_one_that_climbs() -> None:
    assert MetaController().law == ControllerLaw.load(POLICIES / "controller.json") == CLIMB


GAIN = "gain"
FOREIGN: dict[str, Callable[[], dict[str, Tensor]]] = {
    "one too few": lambda: {name: t for name, t in BUSY.tensors().items() if name != GAIN},
    "one too many": lambda: BUSY.tensors() | {"gain2": torch.zeros(())},
    "a vector for a number": lambda: BUSY.tensors() | {GAIN: torch.zeros(1, dtype=torch.float64)},
    "too short a vector": lambda: BUSY.tensors() | {"trust": torch.zeros(5, dtype=torch.float64)},
    "single precision": lambda: {name: t.float() for name, t in BUSY.tensors().items()},
    "whole numbers": lambda: BUSY.tensors() | {GAIN: torch.ones((), dtype=torch.int64)},
    "NaN": lambda: BUSY.tensors() | {GAIN: torch.tensor(math.nan, dtype=torch.float64)},
    "infinity": lambda: BUSY.tensors() | {"late_step": torch.tensor(math.inf, dtype=torch.float64)},
}


@pytest.mark.parametrize("what", FOREIGN)
def test_foreign_tensors_are_refused_in_one_line_that_names_the_tensor(tmp_path: Path, what: str) -> None:
    with pytest.raises(ValueError, match=r"cannot read the policy .*controller.*tensor '") as caught:
        MetaController.from_policy(written(tmp_path, FOREIGN[what]()))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("changes", [{"climbs": 1}, {"climbs": None}])
def test_a_law_that_does_not_say_whether_it_climbs_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"controller\.json.*'climbs' must be true or false"):
        MetaController.from_policy(written(tmp_path, **changes))


def test_a_law_without_its_numbers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"controller\.json: ValueError: it lacks tensor"):
        MetaController.from_policy(written(tmp_path, {}))


def test_a_law_of_other_signals_is_refused_whatever_its_parameters(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"signals version 99.*train it anew") as caught:
        MetaController.from_policy(written(tmp_path, {"other": torch.zeros(3)}, signals_version=99))
    assert "\n" not in str(caught.value)


def test_adaptive_takes_a_policy_folder(tmp_path: Path) -> None:
    written(tmp_path)
    (tmp_path / "monitor.json").write_text(json.dumps({"signals_version": signal.VERSION, "rho": 0.5}))
    executor = LossExecutor.adaptive(
        {"a": 1.0, "b": 1.0}, base="a", probe=lambda: torch.ones((), requires_grad=True), policy=tmp_path
    )
    controller, monitor = executor.modulators
    assert isinstance(controller, MetaController) and controller.law == BUSY
    assert getattr(monitor, "rho", None) == 0.5


@pytest.mark.parametrize(("name", "value"), [("early_step", 1e5), ("late_band", 1.0), ("calibration", -0.1)])
def test_a_law_by_which_a_move_could_be_no_number_is_refused(name: str, value: float, tmp_path: Path) -> None:
    card = {"families": [], "seeds": [], "evidence": "", "made_by": "", "climbs": True}
    write_policy(tmp_path, "controller", replace(CLIMB, **{name: value}).tensors(), card)
    with pytest.raises(ValueError, match=rf"controller.json: ValueError: its {name} is .*must lie in \[0, "):
        MetaController.from_policy(tmp_path)
