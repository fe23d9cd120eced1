"""LossExecutor: laws of the applied weights, exact resume, the one-call system, two optimizers, shadow mode."""

import io
import math
import warnings

import pytest
import torch
from test_executor import WEIGHTS, Push, batch, everything, model, quiet, ready, same, terms
from torch import nn

from adaptive_loss import Guards, LossExecutor, LossMonitor, MetaController, weigher
from adaptive_loss.meta_controller import RULE, ZERO
from adaptive_loss.probes import held_out
from adaptive_loss.weighting.base import Weighting

MODULATORS = {
    "none": list,
    "controller": lambda: [MetaController(RULE)],
    "monitor": lambda: [LossMonitor()],
}


class Nothing(Weighting):
    """A rule that gives no term any weight, as a schedule does before its start."""

    def forward(self, losses, context):
        return torch.zeros(self.n_terms, dtype=torch.float64)


def test_a_rule_that_gives_nothing_under_a_modulator_gives_no_nan():
    # Without a base the modulated weights keep the rule's sum, which here is 0.
    executor = quiet(WEIGHTS, weighting=Nothing(3), modulators=[Push(0.5, 2.0, -3.0)])
    total = executor(terms(model(), batch(0)))
    assert 0 <= total.item() < 1e-9
    assert all(0 <= weight <= 1e-12 for weight in executor.weights.values())


class Greedy(Weighting):
    """A rule that asks for ever more of its first term, and now and then for nothing special."""

    jumps = True
    calm = False

    def forward(self, losses, context):
        return torch.tensor([1.0 if self.calm else 1e6, 1.0, 1.0], dtype=torch.float64)


def test_a_weight_that_a_guard_holds_for_long_raises_one_alarm(monkeypatch):
    monkeypatch.setattr(weigher, "ALARM_AFTER", 5)
    executor = quiet(WEIGHTS, weighting=Greedy(3), guards=Guards(bounds=(0.1, 10.0), share_cap=None))
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)

    def step():
        executor(terms(net, batch(0))).backward()
        return [(event.kind, event.step) for event in executor.step(optimizer).events]

    told = [step() for _ in range(7)]
    assert [events for events in told if events] == [[("clamp", 1)], [("alarm", 5)]]
    executor.weighting.calm = True
    assert step() == []
    executor.weighting.calm = False
    assert [kind for _ in range(6) for kind, _ in step()] == ["clamp", "alarm"]
    alarm = next(event for event in executor.drain_events() if event.kind == "alarm")
    first = next(iter(WEIGHTS))
    assert alarm.reason.startswith(f"bounds has held {first!r} at 10 for 5 steps, 1e+06 is asked for, at a loss of ")


@pytest.mark.parametrize("weighting", ["fixed", "uncertainty", "dwa"])
@pytest.mark.parametrize("push", [None, (0.0, 0.05, -0.08), (0.5, 2.0, -3.0)])
@pytest.mark.parametrize("base", ["fit", None])
def test_the_gradient_applied_is_that_of_the_weights_reported(weighting, push, base):
    executor = quiet(WEIGHTS, base=base, weighting=weighting, modulators=[Push(*push)] if push else [])
    net = model()
    optimizer = torch.optim.Adam([*net.parameters(), *executor.parameters()], lr=0.01)
    for step in range(8):
        optimizer.zero_grad()
        losses = terms(net, batch(step))
        parts = [torch.autograd.grad(loss, list(net.parameters()), retain_graph=True) for loss in losses.values()]
        executor(losses).backward()
        weights = executor.weights
        for p, *gradients in zip(net.parameters(), *parts, strict=True):
            expected = sum(w * g for w, g in zip(weights.values(), gradients, strict=True))
            torch.testing.assert_close(p.grad, expected, rtol=2e-5, atol=1e-6)
        assert executor.step(optimizer).weights == weights == executor.weights
        if step % 4 == 3:
            executor.end_epoch()
        if base is not None and weighting == "fixed":
            assert weights["fit"] == WEIGHTS["fit"]


def test_without_a_base_the_sum_is_kept():
    executor = quiet(WEIGHTS, modulators=[Push(0.1, 0.2, -0.2)], guards=Guards(share_cap=None))
    net, optimizer = ready(executor, steps=0)
    for step in range(30):
        executor(terms(net, batch(step))).backward()
        weights = executor.step(optimizer).weights
        assert sum(weights.values()) == pytest.approx(sum(WEIGHTS.values()), rel=1e-12)
    assert weights["small"] > 2 * WEIGHTS["small"]


def test_base_and_off_terms_never_move_and_reach_bounds_the_rest():
    executor = quiet(
        {"fit": 1e-13, "small": 1e-13, "sharp": 0.0},
        base="fit",
        modulators=[Push(1.0, 1.0, 1.0)],
        guards=Guards(share_cap=None, spikes=False),
    )
    ready(executor, steps=30)
    assert executor.weights["fit"] == 1e-13 and executor.weights["sharp"] == 0.0
    assert executor.weights["small"] / 1e-13 == pytest.approx(1e4, rel=1e-9)


def test_share_cap_binds_and_is_reported_when_it_begins():
    executor = quiet(WEIGHTS, base="fit", modulators=[Push(0.0, 1.0, 0.0)], guards=Guards(share_cap=0.5))
    net, _ = ready(executor, steps=9)
    losses = {n: loss.item() for n, loss in terms(net, batch(30)).items()}
    executor(terms(net, batch(30)))
    mass = {n: w * losses[n] for n, w in executor.weights.items()}
    assert mass["small"] / sum(mass.values()) == pytest.approx(0.5, rel=1e-5)
    reasons = [event.reason for event in executor.drain_events() if event.kind == "clamp"]
    assert reasons.count("share cap holds 'small'") == 1


@pytest.mark.parametrize("weighting", ["fixed", "uncertainty", "dwa"])
@pytest.mark.parametrize("base", ["fit", None])
def test_a_zero_controller_and_rho_zero_change_no_bit(weighting, base):
    def train(modulators) -> nn.Module:
        net = model()
        probe = held_out(lambda x: terms(net, x)["fit"], batch(99), batch_size=8)
        executor = quiet(WEIGHTS, base=base, weighting=weighting, modulators=modulators, probe=probe, total_steps=30)
        optimizer = torch.optim.Adam([*net.parameters(), *executor.parameters()], lr=0.01)
        for step in range(30):
            optimizer.zero_grad()
            executor(terms(net, batch(step))).backward()
            executor.step(optimizer)
            if step % 5 == 4:
                executor.end_epoch()
        return net

    plain = train([]).state_dict()
    assert same(plain, train([MetaController(ZERO)]).state_dict())
    assert same(plain, train([LossMonitor(rho=0.0)]).state_dict())


def test_a_target_is_held():
    p = nn.Parameter(torch.tensor(0.0))
    executor = LossExecutor({"pull": 1.0, "stay": 1.0}, base="pull", targets={"stay": 0.25})
    optimizer = torch.optim.SGD([p], lr=0.05)
    for _ in range(500):
        optimizer.zero_grad()
        executor({"pull": (p - 3).square(), "stay": p.square()}).backward()
        executor.step(optimizer)
    # stay = p² = 1/4 at p = 1/2, where 2(p − 3) + w·2p = 0 gives w = 5.
    assert p.item() == pytest.approx(0.5, rel=0.02) and executor.weights["stay"] == pytest.approx(5, rel=0.05)
    assert executor.weights["pull"] == 1.0


def test_export():
    executor = quiet({"a": 1.0, "b": 1.0}, base="a", modulators=[Push(0.0, 0.01)], guards=Guards(share_cap=None))
    p = nn.Parameter(torch.tensor(1.0))
    optimizer = torch.optim.SGD([p], lr=0.0)
    for _ in range(3):
        executor({"a": p**2, "b": p**2}).backward()
        executor.step(optimizer)
    found = executor.export()
    path = [math.exp(0.01 * step) for step in range(3)]
    assert found["final"] == executor.weights == {"a": 1.0, "b": pytest.approx(path[-1])}
    assert found["mean"] == {"a": 1.0, "b": pytest.approx(sum(path) / 3)}
    assert [point["step"] for point in found["schedule"]] == [1, 2, 3]
    assert [point["b"] for point in found["schedule"]] == pytest.approx(path)


# ---- resume -------------------------------------------------------------------------------------------------------


def system(weighting: str, kind: str):
    net = model()
    probe = held_out(lambda x: terms(net, x)["fit"], batch(99), batch_size=8)
    executor = quiet(
        WEIGHTS, base="fit", weighting=weighting, modulators=MODULATORS[kind](), probe=probe, total_steps=40
    )
    optimizer = torch.optim.Adam([*net.parameters(), *executor.parameters()], lr=0.01)
    return net, optimizer, executor


def advance(net, optimizer, executor, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        losses = terms(net, batch(step))
        if step == 13:
            losses["sharp"] = losses["sharp"] * math.nan
        executor(losses).backward()
        executor.step(optimizer)
        if step % 6 == 5:
            executor.end_epoch()


@pytest.mark.parametrize("weighting", ["fixed", "uncertainty", "dwa"])
@pytest.mark.parametrize("kind", list(MODULATORS))
def test_resume_continues_bit_for_bit(weighting, kind):
    whole = system(weighting, kind)
    advance(*whole, range(30))
    for cut in (1, 14, 24):  # before a look-ahead, just after a skip, at an epoch's edge
        first = system(weighting, kind)
        advance(*first, range(cut))
        file = io.BytesIO()
        torch.save([part.state_dict() for part in first], file)
        file.seek(0)
        second = system(weighting, kind)
        for part, state in zip(second, torch.load(file, weights_only=True), strict=True):
            part.load_state_dict(state)
        advance(*second, range(cut, 30))
        assert same(everything(*whole), everything(*second)), cut
        assert whole[2].export() == second[2].export()
    if kind != "none":
        assert whole[2].signals.look_aheads > 10


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (lambda: LossExecutor({"fit": 1.0, "z": 1.0}), "terms"),
        (lambda: LossExecutor(WEIGHTS), "base"),
        (lambda: LossExecutor(WEIGHTS, base="fit", targets={"small": 1.0}), "targets"),
        (lambda: LossExecutor(WEIGHTS, base="fit", weighting="dwa"), "weighting"),
        (lambda: quiet(WEIGHTS, base="fit", modulators=[LossMonitor()]), "modulators"),
    ],
)
def test_a_foreign_state_is_refused_and_nothing_changes(other, words):
    executor = quiet(WEIGHTS, base="fit", modulators=[MetaController(RULE)])
    ready(executor)
    stranger = other()
    before = dict(stranger.state_dict())
    with pytest.raises(ValueError, match=f"another executor: its {words} are"):
        stranger.load_state_dict(executor.state_dict())
    assert same(before, dict(stranger.state_dict()))


# ---- the whole system ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kwargs", [{}, {"total_steps": 60}, {"base": "fit"}, {"targets": {"small": 0.2}}])
@pytest.mark.parametrize("probed", [False, True])
def test_adaptive_in_three_lines(kwargs, probed):
    net = model()
    probe = held_out(lambda x: terms(net, x)["fit"], batch(99), model=net, batch_size=8) if probed else None
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        executor = LossExecutor.adaptive(WEIGHTS, probe=probe, **kwargs)
        optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
        for step in range(60):
            optimizer.zero_grad()
            executor(terms(net, batch(step))).backward()
            assert executor.step(optimizer).applied
    assert [str(w.message).split(":")[1].strip() for w in told] == ([] if probed else ["no probe was given"])
    assert all(math.isfinite(w) and w > 0 for w in executor.weights.values())
    assert (executor.signals.look_aheads > 10) is probed


def test_two_executors_and_two_optimizers_in_a_gan():
    torch.manual_seed(0)
    generator, critic = nn.Linear(2, 1), nn.Sequential(nn.Linear(1, 8), nn.ReLU(), nn.Linear(8, 1))
    g_step = torch.optim.Adam(generator.parameters(), lr=0.05)
    d_step = torch.optim.Adam(critic.parameters(), lr=0.01)
    g_loss = LossExecutor({"fool": 1.0, "match": 1.0}, base="fool")
    d_loss = LossExecutor({"real": 1.0, "fake": 1.0, "size": 0.01})
    logistic = nn.functional.softplus
    for _ in range(50):
        real, noise = 2 + torch.randn(32, 1), torch.randn(32, 2)
        d_step.zero_grad()
        fake = critic(generator(noise).detach())
        size = sum(p.square().sum() for p in critic.parameters())
        d_loss({"real": logistic(-critic(real)).mean(), "fake": logistic(fake).mean(), "size": size}).backward()
        assert d_loss.step(d_step).applied
        g_step.zero_grad()
        made = generator(noise)
        before = [p.detach().clone() for p in critic.parameters()]
        g_loss({"fool": logistic(-critic(made)).mean(), "match": (made.mean() - 2).square()}).backward()
        assert g_loss.step(g_step).applied
        assert all(torch.equal(a, b) for a, b in zip(before, critic.parameters(), strict=True))
    assert g_loss.signals.step == d_loss.signals.step == 50
    assert generator(torch.randn(500, 2)).mean().item() > 0.5


# ---- shadow mode --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [None, 12])
def test_shadow_mode_trains_as_the_plain_loop_bit_for_bit(poison):
    def train(executor: LossExecutor | None) -> nn.Module:
        net = model()
        optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
        for step in range(20):
            optimizer.zero_grad()
            losses = terms(net, batch(step))
            if step == poison:
                losses["small"] = losses["small"] * math.nan
            if executor is None:
                sum(WEIGHTS[n] * loss for n, loss in losses.items()).backward()
                optimizer.step()
            else:
                executor(losses).backward()
                record = executor.step(optimizer)
                assert record.applied and record.weights == WEIGHTS
                assert (record.reason is None) == (poison is None or step < poison)
        return net

    for weighting in ("fixed", "dwa"):
        shadow = quiet(WEIGHTS, weighting=weighting, modulators=[Push(0.0, 0.3, 0.0)], apply=False)
        assert same(train(None).state_dict(), train(shadow).state_dict())
        assert shadow.weights == WEIGHTS != shadow.suggested and shadow.skipped_steps == 0
        assert shadow.export()["final"] == WEIGHTS
