"""Rules that hold a set-point, and schedules: golden values, closed loops and resume, all through the executor."""

from __future__ import annotations

import io
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from adaptive_loss import Guards, LossExecutor
from adaptive_loss.knob import Limits
from adaptive_loss.modulator import SetPoint
from adaptive_loss.weighting import weightings
from adaptive_loss.weighting.ada import ADA
from adaptive_loss.weighting.adaptive_kl import AdaptiveKL
from adaptive_loss.weighting.balancing import Balancing, balanced_mse
from adaptive_loss.weighting.base import Weighting
from adaptive_loss.weighting.free_bits import free_bits
from adaptive_loss.weighting.geco import GECO
from adaptive_loss.weighting.optimal_sigma import OptimalSigma, gaussian_weight
from adaptive_loss.weighting.pi import PI
from adaptive_loss.weighting.schedule import Schedule, scheduled

QUIET = Guards(spikes=False, share_cap=None)
STILL = nn.Parameter(torch.zeros(1))
HOLDERS: dict[str, Callable[[], Weighting]] = {
    "geco": lambda: GECO(2, speed=0.1, decay=0.9),
    "pi": lambda: PI(2, integral=0.2, limits=Limits((0.0, 20.0))),
    "adaptive_kl": lambda: AdaptiveKL(2, batch_size=1000),
}


def feed(executor: LossExecutor, *steps: dict[str, float | None]) -> list[dict[str, float]]:
    """Give losses step by step; the weights applied on each step."""
    optimizer, seen = torch.optim.SGD([STILL], lr=0.0), []
    for losses in steps:
        live = {n: None if v is None else torch.tensor(v, requires_grad=True) for n, v in losses.items()}
        executor(live).backward()
        assert executor.step(optimizer).applied
        seen.append(executor.weights)
    return seen


def vae(weighting: str | Weighting, **settings: object) -> LossExecutor:
    weights = settings.pop("weights", {"rec": 1.0, "kl": 1.0})
    return LossExecutor(weights, weighting=weighting, guards=QUIET, **settings)  # type: ignore[arg-type]


# ---- geco, pi, adaptive_kl ------------------------------------------------------------------------------------------


def test_geco_through_the_executor():
    # λ·exp(s·C̄), C = start·(rec − κ²), C̄ ← 0.99·C̄ + 0.01·C from the first C on: 4, then 0.99·4 + 0.01·(−2) = 3.94.
    executor = vae(GECO(2, speed=0.01), weights={"rec": 2.0, "kl": 1.0}, targets={"rec": 3.0})
    seen = feed(executor, {"rec": 5.0, "kl": 9.0}, {"rec": 2.0, "kl": 9.0}, {"rec": 3.0, "kl": 9.0})
    expected = [2.0, 2 * math.exp(0.04), 2 * math.exp(0.04 + 0.0394)]
    assert [weights["rec"] for weights in seen] == pytest.approx(expected, rel=1e-12)
    assert {weights["kl"] for weights in seen} == {1.0}


def test_pi_through_the_executor():
    # β = Kp/(1 + exp(e)) − Ki·Σe, e = 8 − KL: Shao et al. 2020, algorithm 1, one step after the observation.
    executor = vae("pi", targets={"kl": 8.0})
    kls = [10.0, 11.0, 7.0, 8.0]
    seen = feed(executor, *({"rec": 1.0, "kl": kl} for kl in kls))
    total, expected = 0.0, [0.0]
    for kl in kls[:-1]:
        total += 1e-4 * (kl - 8)
        expected.append(0.01 / (1 + math.exp(8 - kl)) + total)
    assert [weights["kl"] for weights in seen] == pytest.approx(expected, rel=1e-9)


def test_adaptive_kl_through_the_executor():
    # Ziegler et al. 2019: β₀ = 0.2, target 6, horizon 10k, here 512 episodes a step.
    executor = vae(AdaptiveKL(2, batch_size=512), weights={"rec": 1.0, "kl": 0.2}, targets={"kl": 6.0})
    seen = feed(executor, {"rec": 1.0, "kl": 9.0}, {"rec": 1.0, "kl": 5.7}, {"rec": 1.0, "kl": 6.0})
    expected = [0.2, 0.2 * (1 + 0.2 * 0.0512), 0.2 * (1 + 0.2 * 0.0512) * (1 - 0.05 * 0.0512)]
    assert [weights["kl"] for weights in seen] == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("name", HOLDERS)
def test_every_holder_holds_its_target(name):
    # stay = p² = ¼ at p = ½, where 2(p − 3) + w·2p = 0 gives w = 5.
    p = nn.Parameter(torch.tensor(0.0))
    executor = LossExecutor({"pull": 1.0, "stay": 1.0}, base="pull", targets={"stay": 0.25}, weighting=HOLDERS[name]())
    optimizer = torch.optim.SGD([p], lr=0.05)
    for _ in range(700):
        optimizer.zero_grad()
        executor({"pull": (p - 3).square(), "stay": p.square()}).backward()
        executor.step(optimizer)
    assert p.item() == pytest.approx(0.5, rel=0.02) and executor.weights["stay"] == pytest.approx(5, rel=0.05)
    assert executor.weights["pull"] == 1.0


@pytest.mark.parametrize("name", HOLDERS)
def test_the_default_law_is_left_out(name):
    assert not [m for m in vae(HOLDERS[name](), targets={"kl": 1.0}).modulators if isinstance(m, SetPoint)]


@pytest.mark.parametrize("name", [*HOLDERS, "free_bits"])
def test_without_targets_one_clear_line(name):
    with pytest.raises(ValueError, match=f"weighting '{name}' needs targets: say what to hold"):
        vae(name)({"rec": torch.tensor(1.0, requires_grad=True)})


@pytest.mark.parametrize("name", HOLDERS)
def test_an_absent_term_changes_nothing(name):
    there, away = (vae(HOLDERS[name](), targets={"kl": 1.0}) for _ in range(2))
    feed(there, {"rec": 1.0, "kl": 3.0}, {"rec": 1.0, "kl": 2.0})
    feed(away, {"rec": 1.0, "kl": 3.0}, {"rec": 1.0, "kl": None}, {"rec": 1.0}, {"rec": 1.0, "kl": 2.0})
    assert there.weighting.get_extra_state() == away.weighting.get_extra_state()


@pytest.mark.parametrize("name", HOLDERS)
def test_a_rejected_step_changes_nothing(name):
    executor = vae(HOLDERS[name](), targets={"kl": 1.0})
    feed(executor, {"rec": 1.0, "kl": 3.0})
    before = executor.weighting.get_extra_state()
    for _ in range(3):
        executor({"rec": torch.tensor(1.0, requires_grad=True), "kl": torch.tensor(math.nan, requires_grad=True)})
        assert not executor.step(torch.optim.SGD([STILL], lr=0.0)).applied
    executor({"rec": torch.tensor(1.0, requires_grad=True), "kl": torch.tensor(9.0, requires_grad=True)})
    assert executor.weighting.get_extra_state() == before, "forward alone must not move a knob"


@pytest.mark.parametrize("name", HOLDERS)
@pytest.mark.parametrize("target", [-2.0, 0.0, 1e-10, 1e10])
@pytest.mark.parametrize("value", [0.0, -5.0, 1e10, 1e-10])
def test_any_target_and_loss_leave_finite_weights(name, target, value):
    executor = vae(name, targets={"kl": target})
    seen = feed(executor, *([{"rec": 1.0, "kl": value}] * 30))
    assert all(math.isfinite(w) and w >= 0 for weights in seen for w in weights.values())


@pytest.mark.parametrize("name", HOLDERS)
@pytest.mark.parametrize("n_terms", [1, 1000])
def test_one_and_a_thousand_targets(name, n_terms):
    names = [f"t{i}" for i in range(n_terms)]
    executor = LossExecutor(dict.fromkeys(names, 1.0), targets=dict.fromkeys(names, 1.0), weighting=name, guards=QUIET)
    seen = feed(executor, *([dict.fromkeys(names, 2.0)] * 3))
    assert all(math.isfinite(w) for w in seen[-1].values()) and len(set(seen[-1].values())) == 1


@pytest.mark.parametrize("target", [-2.0, 3.0])
@pytest.mark.parametrize("name", HOLDERS)
def test_above_its_target_a_term_gains_weight(name, target):
    executor = vae(HOLDERS[name](), targets={"kl": target})
    seen = feed(executor, *([{"rec": 1.0, "kl": target + 0.5}] * 5))
    assert seen[-1]["kl"] > seen[1]["kl"] > seen[0]["kl"]


@pytest.mark.parametrize("name", HOLDERS)
def test_saturation_is_reported_as_an_event(name):
    limits = Limits((0.5, 1.0), alarm_after=7)
    rule = weightings.get(name)(2, limits=limits, **({"value": 0.5} if name == "pi" else {}))
    executor = vae(rule, targets={"kl": 3.0})
    feed(executor, *([{"rec": 1.0, "kl": 1e5}] * 30))
    alarms = [event for event in executor.drain_events() if event.kind == "alarm"]
    assert len(alarms) == 1 and alarms[0].details["bound"] == 1.0 and alarms[0].details["observed"] == 1e5
    assert f"weighting '{name}': the weight of 'kl' has been at its bound 1 for 7 steps" in alarms[0].reason


def test_warm_up_dead_band_and_slew_reach_the_rule():
    limits = Limits((1e-4, 1e4), slew=0.01, in_log=True, dead_band=0.5, warmup=2)
    executor = vae(GECO(2, speed=1.0, decay=0.0, limits=limits), targets={"kl": 3.0})
    seen = feed(executor, *({"rec": 1.0, "kl": kl} for kl in (9.0, 9.0, 3.4, 9.0, 9.0, 9.0)))
    assert [w["kl"] for w in seen] == pytest.approx([1, 1, 1, 1, math.exp(0.01), math.exp(0.02)], rel=1e-9)


def test_settings_that_cannot_be():
    for wrong in (
        lambda: GECO(2, speed=0.0),
        lambda: GECO(2, limit=math.inf),
        lambda: GECO(2, limits=Limits((-1.0, 2.0))),
        lambda: PI(2, integral=-1e-4),
        lambda: AdaptiveKL(2, horizon=0),
        lambda: ADA(2, interval=0),
        lambda: OptimalSigma(2, floor=0.0),
        lambda: Balancing(2, decay=1.0),
    ):
        with pytest.raises(ValueError, match=r"give|needs|negative"):
            wrong()


def test_another_executors_targets_are_refused():
    state = vae("geco", targets={"kl": 1.0}).weighting.state_dict()
    with pytest.raises(ValueError, match="the state is of"):
        vae("geco", targets={"rec": 1.0}).weighting.load_state_dict(state)


# ---- ada ------------------------------------------------------------------------------------------------------------


def play(executor: LossExecutor, values: list[float]) -> None:
    assert isinstance(executor.weighting, ADA)
    for value in values:
        executor.weighting.observe(value)
        feed(executor, {"rec": 1.0, "kl": 1.0})


def test_ada_through_the_executor():
    # Karras et al. 2020: every 4 minibatches, sign(mean − 0.6)·(64·4)/500k; NVlabs/stylegan2-ada-pytorch defaults.
    heard: list[float] = []
    executor = vae(ADA(2, probability=0.3, on_change=heard.append))
    play(executor, [0.9, 0.5, 0.9, 0.5])  # mean 0.7
    play(executor, [0.4, 0.5, 0.6])
    assert heard == [0.3 + 0.000512]
    play(executor, [0.7])  # mean 0.55
    assert heard[1:] == pytest.approx([0.3]) and executor.weighting.probability == heard[-1]
    assert executor.weights == {"rec": 1.0, "kl": 1.0}


def test_ada_rests_at_0_and_stops_at_1_with_an_alarm():
    executor = vae(ADA(2, batch_size=100_000, interval=1, limits=Limits((0.0, 1.0), rest=0.0, alarm_after=5)))
    play(executor, [-1.0] * 20)
    assert executor.weighting.probability == 0.0 and not executor.drain_events()
    play(executor, [torch.tensor(0.9)] * 20)  # type: ignore[list-item]
    assert executor.weighting.probability == 1.0
    assert [event.kind for event in executor.drain_events()] == ["alarm"]


def test_ada_counts_accepted_finite_observations_only():
    executor = vae(ADA(2, interval=1))
    play(executor, [math.nan, math.inf])
    feed(executor, {"rec": 1.0, "kl": 1.0})  # no observation
    executor.weighting.observe(0.9)
    executor({"rec": torch.tensor(math.nan, requires_grad=True)})
    executor.step(torch.optim.SGD([STILL], lr=0.0))
    assert executor.weighting.probability == 0.0
    play(executor, [0.9])
    assert executor.weighting.probability == pytest.approx(64 / 500_000)


# ---- optimal_sigma, balancing ---------------------------------------------------------------------------------------


def test_optimal_sigma_has_the_gradient_of_the_whole_likelihood():
    # −log p = D·MSE/(2σ²) + D·log σ with σ² = MSE put in: its gradient is that of D/2·log MSE.
    w = nn.Parameter(torch.tensor([0.3, -1.2], dtype=torch.float64))
    x, y = torch.tensor([[1.0, 2.0], [0.5, -1.0]], dtype=torch.float64), torch.tensor([1.0, 0.2], dtype=torch.float64)
    executor = vae(OptimalSigma(2, dimensions=784), base="rec")
    mse = (x @ w - y).square().mean()
    (own,) = torch.autograd.grad(784 / 2 * mse.log(), [w], retain_graph=True)
    executor({"rec": mse}).backward()
    torch.testing.assert_close(w.grad, own)


def test_optimal_sigma_running_by_hand():
    executor = vae(OptimalSigma(2, dimensions=10, decay=0.9), base="rec", weights={"rec": 2.0, "kl": 0.5})
    seen = feed(executor, {"rec": 0.5, "kl": 1.0}, {"rec": 0.1, "kl": 1.0}, {"kl": 1.0}, {"rec": 0.3, "kl": 1.0})
    # σ² of start·rec is 1, then 0.9·1 + 0.1·0.2 = 0.92; weights are start·D/(2σ²), used before the step's own is in;
    # an absent term shows its last one.
    assert [w["rec"] for w in seen] == pytest.approx([10.0, 10.0, 10.0, 10 / 0.92], rel=1e-6)
    assert {w["kl"] for w in seen} == {0.5}


def test_optimal_sigma_follows_the_batch_without_a_rate_limit():
    executor = LossExecutor({"rec": 1.0, "kl": 1.0}, base="rec", weighting="optimal_sigma", guards=QUIET)
    seen = feed(executor, {"rec": 8.0, "kl": 1.0}, {"rec": 0.02, "kl": 1.0}, {"kl": 1.0})
    assert [w["rec"] for w in seen] == pytest.approx([1 / 16, 25.0, 25.0])


@pytest.mark.parametrize("name", ["optimal_sigma", "balancing"])
@pytest.mark.parametrize("value", [0.0, -3.0, 1e-10, 1e10, None])
def test_any_error_leaves_a_finite_weight(name, value):
    executor = vae(name, base="rec")
    seen = feed(executor, *([{"rec": value, "kl": 1.0}] * 3), {"rec": 0.5, "kl": 1.0})
    assert all(0 < w["rec"] <= math.exp(12) / 2 for w in seen)


def test_gaussian_weight_is_floored_where_the_public_code_clips():
    # orybkin/sigma-vae-pytorch clips log σ (softly) at −6.
    assert gaussian_weight(torch.tensor(0.0)).item() == pytest.approx(math.exp(12) / 2)
    assert gaussian_weight(torch.tensor(0.37), 3).item() == pytest.approx(3 / 0.74)


def test_balancing_by_hand():
    # asperti/BalancingVAE, computed_gamma.py: mse ← min(mse, 0.99·mse + 0.01·batch); γ² = mse, weight 1/(2γ²).
    executor = vae("balancing", base="rec")
    seen = feed(executor, *({"rec": rec, "kl": 1.0} for rec in (0.5, 0.4, 9.0, 0.1, 0.1)))
    errors = [0.5, 0.5, 0.499, 0.499, 0.99 * 0.499 + 0.001]
    assert [w["rec"] for w in seen] == pytest.approx([1 / (2 * e) for e in errors], rel=1e-6)
    assert balanced_mse(torch.tensor(0.2), torch.tensor(7.0)).item() == pytest.approx(0.2)


@pytest.mark.parametrize("name", ["optimal_sigma", "balancing"])
def test_without_a_base_one_clear_line(name):
    with pytest.raises(ValueError, match=f"weighting '{name}' needs base"):
        vae(name)({"rec": torch.tensor(1.0, requires_grad=True)})


# ---- free bits ------------------------------------------------------------------------------------------------------


def test_free_bits_by_hand():
    # Kingma et al. 2016: Σⱼ max(λ, KLⱼ), λ = ½; a dimension below its floor has no gradient.
    kl = torch.tensor([0.1, 2.0, 0.49], requires_grad=True)
    total = free_bits(kl, 0.5)
    total.backward()
    assert total.item() == 3.0 and kl.grad.tolist() == [0.0, 1.0, 0.0]
    assert free_bits(torch.zeros(7, 3), 0.25).tolist() == [0.75] * 7


def test_free_bits_as_a_rule_has_the_gradient_of_the_maximum():
    executor = vae("free_bits", weights={"rec": 1.0, "kl": 0.5}, targets={"kl": 3.0})
    seen = feed(executor, *({"rec": 1.0, "kl": kl} for kl in (3.1, 2.9, 3.0, 40.0)), {"rec": 1.0})
    assert [w["kl"] for w in seen] == [0.5, 0.0, 0.0, 0.5, 0.5], "and it leaps both ways"


# ---- schedule -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "progress", "expected"),
    [
        ("linear", 0.3, 0.3),
        ("cosine", 1 / 3, 0.25),
        # Fu et al. 2019, M = 4, R = ½: a ramp over the first half of each quarter.
        ("cyclical", 0.03125, 0.25),
        ("cyclical", 0.125, 1.0),
        ("cyclical", 0.24, 1.0),
        ("cyclical", 0.5, 0.0),
        ("cyclical", 0.78125, 0.25),
        # Bowman et al. 2016's logistic, stretched: (1/(1 + e³) − a)/(1 − 2a) with a = 1/(1 + e⁶).
        ("sigmoid", 0.25, (1 / (1 + math.exp(3)) - 1 / (1 + math.exp(6))) / (1 - 2 / (1 + math.exp(6)))),
        ("sigmoid", 0.5, 0.5),
        ("step", 0.999, 0.0),
    ],
)
def test_shapes_by_hand(kind, progress, expected):
    assert scheduled(kind, progress) == pytest.approx(expected, abs=1e-12)
    assert scheduled(kind, progress, init_value=3.0, end_value=1.0) == pytest.approx(3 - 2 * expected)


@pytest.mark.parametrize("kind", ["linear", "sigmoid", "cyclical", "step", "cosine"])
def test_every_shape_meets_its_ends(kind):
    assert scheduled(kind, -5.0, init_value=0.2, end_value=7.0) == pytest.approx(0.2)
    assert scheduled(kind, 0.0, init_value=0.2, end_value=7.0) == pytest.approx(0.2)
    assert scheduled(kind, 1.0, init_value=0.2, end_value=7.0) == 7.0
    assert scheduled(kind, math.inf, init_value=0.2, end_value=7.0) == 7.0
    values = [scheduled(kind, i / 100) for i in range(100)]
    assert min(values) >= 0 and max(values) <= 1
    assert kind == "cyclical" or values == sorted(values)


def ramp(executor: LossExecutor, steps: int, term: str = "kl") -> list[float]:
    return [weights[term] for weights in feed(executor, *([{"rec": 1.0, "kl": 1.0}] * steps))]


def test_schedule_in_steps_and_in_shares_of_the_run():
    in_steps = ramp(vae(Schedule(2, begin=2, end=6), base="rec", weights={"rec": 1.0, "kl": 0.5}), 8)
    assert in_steps == pytest.approx([0.0, 0.0, 0.0, 0.125, 0.25, 0.375, 0.5, 0.5])
    shares = Schedule(2, begin=0.25, end=0.75)
    assert ramp(vae(shares, base="rec", weights={"rec": 1.0, "kl": 0.5}, total_steps=8), 8) == in_steps


def test_schedule_moves_all_but_the_base_or_whom_it_is_told():
    assert feed(vae(Schedule(2, "step", 0, 5), base="kl"), {"rec": 1.0, "kl": 1.0})[0] == {"rec": 0.0, "kl": 1.0}
    seen = feed(vae(Schedule(2, "step", 0, 5, terms=["rec"]), base="rec"), {"rec": 1.0, "kl": 1.0})[0]
    assert seen == {"rec": 0.0, "kl": 1.0}
    with pytest.raises(KeyError, match="'beta' is not a term; they are: rec, kl"):
        vae(Schedule(2, terms=["beta"]))


def test_schedule_without_an_end_to_reach_says_so():
    line = r"weighting 'schedule' needs total steps: say LossExecutor\(..., total_steps=N\)"
    with pytest.raises(ValueError, match=line):
        vae("schedule")({"rec": torch.tensor(1.0, requires_grad=True)})
    assert Schedule(2).needs == ("total steps",) and Schedule(2, begin=0, end=9).needs == ()
    assert ramp(vae("schedule", total_steps=4, base="rec"), 6) == pytest.approx([0.0, 0.25, 0.5, 0.75, 1.0, 1.0])


def test_a_leap_is_not_rate_limited():
    assert ramp(vae(Schedule(2, "step", 0, 3), base="rec"), 5) == [0.0, 0.0, 0.0, 1.0, 1.0]


def test_schedule_multiplies_to_a_holder():
    executor = vae(Schedule(2, begin=0, end=4, terms=["kl"]) * GECO(2, speed=0.1, decay=0.0), targets={"kl": 3.0})
    seen = ramp(executor, 3)
    assert seen == pytest.approx([0.0, 0.25 * math.exp(-0.1), 0.5 * math.exp(-0.2)])


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "square"},
        {"begin": 5, "end": 2},
        {"begin": -1, "end": 2},
        {"end": math.nan},
        {"init_value": -1.0},
        {"end_value": math.inf},
        {"cycles": 0},
        {"ramp": 0.0},
    ],
)
def test_schedules_that_cannot_be(wrong):
    with pytest.raises(ValueError, match="Schedule"):
        Schedule(2, **wrong)


# ---- resume ---------------------------------------------------------------------------------------------------------

RESUMED: dict[str, tuple[Callable[[], Weighting], dict[str, object]]] = {
    **{name: (make, {"targets": {"kl": 0.4}}) for name, make in HOLDERS.items()},
    "free_bits": (lambda: weightings.get("free_bits")(2), {"targets": {"kl": 0.4}}),
    "ada": (lambda: ADA(2), {}),
    "optimal_sigma": (lambda: OptimalSigma(2, decay=0.9), {"base": "rec"}),
    "balancing": (lambda: Balancing(2), {"base": "rec"}),
    "schedule": (lambda: Schedule(2, "cyclical"), {"total_steps": 30, "base": "rec"}),
}


def train(p: nn.Parameter, executor: LossExecutor, steps: range) -> list[tuple[Tensor, dict[str, float]]]:
    optimizer, path = torch.optim.SGD([p], lr=0.02), []
    for step in steps:
        optimizer.zero_grad()
        noise = math.sin(step)
        if isinstance(executor.weighting, ADA):
            executor.weighting.observe(0.6 + 0.3 * noise)
        losses = {"rec": (p - 2 + noise).square(), "kl": p.square()}
        executor({"rec": losses["rec"]} if step % 7 == 3 else losses).backward()
        executor.step(optimizer)
        path.append((p.detach().clone(), executor.weights))
    return path


@pytest.mark.parametrize("name", RESUMED)
def test_a_loaded_executor_continues_bit_for_bit(name):
    make, settings = RESUMED[name]

    def fresh() -> tuple[nn.Parameter, LossExecutor]:
        return nn.Parameter(torch.tensor(0.1)), vae(make(), **settings)

    whole = train(*fresh(), range(30))
    (p, first), (q, second) = fresh(), fresh()
    head = train(p, first, range(11))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    with torch.no_grad():
        q.copy_(p)
    assert head + train(q, second, range(11, 30)) == whole
    if name == "ada":
        assert second.weighting.probability > 0 and second.weighting.count == 2
