"""Rules that look at gradients: golden values, invariants, and the faults of published code that must not be ours.

Most terms here are linear, Lᵢ = aᵢ·w, so that gᵢ = aᵢ is known without differentiating.
"""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from torch import Tensor, nn

from adaptive_loss import LossExecutor
from adaptive_loss import gradients as taken
from adaptive_loss.guards import Guards
from adaptive_loss.weighting.cosine_gate import CosineGate, gate
from adaptive_loss.weighting.db_mtl import DBMTL, max_norm_weights
from adaptive_loss.weighting.encodec import EnCodec, balanced_weights
from adaptive_loss.weighting.gradient_rule import GradientRule, averaged
from adaptive_loss.weighting.gradnorm import GradNorm, gradnorm_gradient, training_rates
from adaptive_loss.weighting.lr_annealing import LRAnnealing, annealed, entry_sizes
from adaptive_loss.weighting.vqgan import VQGAN, adaptive_weights

RULES: list[type[GradientRule]] = [GradNorm, EnCodec, VQGAN, LRAnnealing, DBMTL, CosineGate]
AGAINST_BASE = (VQGAN, LRAnnealing, CosineGate)
FREE = Guards(rate_limit=None, share_cap=None, spikes=False)
"""Guards that leave a rule's weights alone, but for the bounds."""


def named(values) -> dict:
    return {f"t{i}": value for i, value in enumerate(values) if value is not None}


def executor_of(rule: GradientRule, start: list[float] | None = None, **options) -> LossExecutor:
    weights = named(start or [1.0] * rule.n_terms)
    base = {"base": "t0"} if isinstance(rule, AGAINST_BASE) else {}
    return LossExecutor(weights, weighting=rule, guards=FREE, **{**base, **options})


def linear(w: Tensor, rows: list) -> dict[str, Tensor]:
    """Terms whose gradients are the rows; None is absent."""
    return named([None if row is None else (w * torch.as_tensor(row, dtype=w.dtype)).sum() for row in rows])


def one_step(executor: LossExecutor, w: nn.Parameter, rows: list, lr: float = 0.0):
    w.grad = None
    executor(linear(w, rows), tap=w).backward()
    return executor.step(torch.optim.SGD([w], lr=lr))


def weights_after(rule: GradientRule, steps: list[list], at: list[float] | None = None, **options) -> list[float]:
    executor = executor_of(rule, **options)
    w = nn.Parameter(torch.tensor(at or [1.0] * 2, dtype=torch.float64))
    for rows in steps:
        assert one_step(executor, w, rows).applied
    return list(executor.weights.values())


# ---- golden values, away from initialisation ----------------------------------------------------------------------


def test_gradnorm_rates_and_gradient_by_hand() -> None:
    # L/L0 = (1/2, 1/4, 3/4), mean 1/2; r = (1, 1/2, 3/2). wn = (2, 2, 2), mean 2; targets 2·r^1.5 = (2, .707, 3.674).
    rates = training_rates(torch.tensor([1.0, 1.0, 3.0]), torch.tensor([2.0, 4.0, 4.0]))
    assert rates.tolist() == pytest.approx([1.0, 0.5, 1.5])
    found = gradnorm_gradient(torch.tensor([2.0, 1.0, 0.5]), torch.tensor([1.0, 2.0, 4.0]), rates, 1.5)
    assert found.tolist() == [0.0, 2.0, -4.0]


def test_gradnorm_gradient_is_autograds_with_the_target_held() -> None:
    dice = torch.Generator().manual_seed(5)
    w = torch.rand(4, generator=dice, dtype=torch.float64).requires_grad_()
    norms, rates = (torch.rand(4, generator=dice, dtype=torch.float64) for _ in range(2))
    target = (w * norms).mean().detach() * rates**1.5
    (wanted,) = torch.autograd.grad((w * norms - target).abs().sum(), w)
    torch.testing.assert_close(gradnorm_gradient(w.detach(), norms, rates, 1.5), wanted)


@pytest.mark.parametrize(("optimizer", "rate"), [("adam", 0.025), ("sgd", 1e-3)])
def test_gradnorm_against_the_papers_algorithm_with_torch_optim(optimizer: str, rate: float) -> None:
    """Algorithm 1 of Chen et al. with autograd and torch.optim, renormalised after each step."""
    executor = executor_of(GradNorm(3, rate=rate, optimizer=optimizer))
    p = nn.Parameter(torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64))
    w = nn.Parameter(torch.ones(3, dtype=torch.float64))
    outer = (torch.optim.Adam if optimizer == "adam" else torch.optim.SGD)([w], lr=rate)
    first = None
    for step in range(6):
        losses = [(p[0] - 3) ** 2, 5 * (p[1] + 1) ** 2 / (1 + step), (p * p).sum()]
        norms = torch.stack([torch.autograd.grad(loss, p, retain_graph=True)[0].norm() for loss in losses])
        p.grad = None
        executor(named(losses), tap=p).backward()
        values = torch.stack(losses).detach()
        first = values if first is None else first
        rates = (values / first) / (values / first).mean()
        assert list(executor.weights.values()) == pytest.approx(w.tolist(), rel=1e-9)
        target = (w * norms).mean().detach() * rates**1.5
        outer.zero_grad()
        (w * norms - target).abs().sum().backward()
        outer.step()
        with torch.no_grad():
            w.mul_(3 / w.sum())
        executor.step(torch.optim.SGD([p], lr=0.01))
    assert w.detach().std() > 0.02


def test_encodec_by_hand() -> None:
    # Norms 5 then 10 and 1 then 3, β = .5: averages (.25·5 + .5·10)/.75 = 25/3 and (.25 + 1.5)/.75 = 7/3.
    # Shares 3/4 and 1/4 of R = 2; the weights multiply start weights of 3 and 1, whose gradients these are.
    steps = [[[3 / 3, 4 / 3], [1.0, 0.0]], [[6 / 3, 8 / 3], [0.0, 3.0]]]
    found = weights_after(EnCodec(2, total=2.0, decay=0.5), steps, start=[3.0, 1.0])
    assert found == pytest.approx([3 * 0.75 * 2 / (25 / 3), 0.25 * 2 / (7 / 3)], rel=1e-6)


def test_encodec_gives_each_term_its_share_of_the_gradient() -> None:
    w = nn.Parameter(torch.ones(2, dtype=torch.float64))
    executor = executor_of(EnCodec(2, total=1.0), start=[4.0, 1.0])
    executor(linear(w, [[1e3, 0.0], [0.0, 1e-2]]), tap=w).backward()
    assert w.grad is not None and w.grad.tolist() == pytest.approx([0.8, 0.2], rel=1e-6)


def test_vqgan_by_hand() -> None:
    # Norms 5 and 2: .8·5/(2 + 1e-4); with d = .5 the second step's 10/(4 + 1e-4).
    assert weights_after(VQGAN(2), [[[3.0, 4.0], [2.0, 0.0]]]) == pytest.approx([1.0, 4 / 2.0001], rel=1e-6)
    steps = [[[3.0, 4.0], [2.0, 0.0]], [[6.0, 8.0], [0.0, 4.0]]]
    assert weights_after(VQGAN(2, 0.5), steps) == pytest.approx([1.0, 5 / 4.0001], rel=1e-6)


def test_vqgan_weighs_only_the_terms_it_is_told_to() -> None:
    found = weights_after(VQGAN(3, only=["t2"]), [[[3.0, 4.0], [1.0, 1.0], [2.0, 0.0]]])
    assert found == pytest.approx([1.0, 1.0, 4 / 2.0001], rel=1e-6)
    with pytest.raises(KeyError, match="'t0', which is no auxiliary term; those are: t1, t2"):
        executor_of(VQGAN(3, only=["t0"]))


@pytest.mark.parametrize(("statistic", "alpha", "top"), [("max", None, 8.0), ("mean", None, 5.0), ("max", 0.5, 8.0)])
def test_lr_annealing_by_hand(statistic: str, alpha: float | None, top: float) -> None:
    # |g_base| = (8, 2): greatest 8, mean 5; mean|g_aux| = (1 + 3)/2 = 2, and 1/2 on the second step.
    steps = [[[8.0, -2.0], [1.0, -3.0]], [[8.0, -2.0], [1.0, 0.0]]]
    used = {"max": 0.1, "mean": 0.01}[statistic] if alpha is None else alpha
    once = (1 - used) + used * top / 2
    found = weights_after(LRAnnealing(2, alpha, statistic), steps)
    assert found == pytest.approx([1.0, (1 - used) * once + used * top / 0.5], rel=1e-6)


def test_db_mtl_by_hand() -> None:
    # Losses a·w at w = (1, 1): (7, 2) then (14, 4), norms (5, 2) then (10, √8). Log gradients (5/7, 1), (5/7, √8/4).
    # β = .5: averages 5/7 and (.25 + .5·√8/4)/.75.
    steps = [[[3.0, 4.0], [2.0, 0.0]], [[6.0, 8.0], [2.0, 2.0]]]
    other = (0.25 + 0.5 * math.sqrt(8) / 4) / 0.75
    found = weights_after(DBMTL(2, decay=0.5), steps)
    assert found == pytest.approx([other / (5 / 7) / 14, 1 / 4], rel=1e-6)


def test_cosine_gate_by_hand() -> None:
    # cos((3, 4), (4, 3)) = 24/25, cos((3, 4), (−4, 3)) = 0, cos((3, 4), (−1, 0)) = −3/5.
    rows = [[3.0, 4.0], [4.0, 3.0], [-4.0, 3.0], [-1.0, 0.0]]
    assert weights_after(CosineGate(4), [rows]) == pytest.approx([1.0, 1.0, 0.0, 0.0], abs=1e-9)
    found = weights_after(CosineGate(4, smooth=True), [rows])
    assert found == pytest.approx([1.0, 24 / 25, 0.0, 0.0], abs=1e-6)


def test_a_closed_gate_opens_at_once() -> None:
    executor = LossExecutor({"t0": 1.0, "t1": 1.0}, base="t0", weighting="cosine_gate")
    w = nn.Parameter(torch.ones(2))
    assert [round(one_step(executor, w, [[1.0, 0.0], row]).weights["t1"], 6) for row in ([-1.0, 0.0], [1.0, 0.0])] == [
        0.0,
        1.0,
    ]


def test_averages_are_corrected_for_their_start_and_skip_nan() -> None:
    # β = .9 on 1, NaN, 4: (.09·1 + .1·4)/.19; the other entry has the one value 2.
    total = weight = torch.zeros(2, dtype=torch.float64)
    for values in ([1.0, math.nan], [math.nan, 2.0], [4.0, math.nan]):
        total, weight = averaged(total, weight, torch.tensor(values, dtype=torch.float64), 0.9)
    assert (total / weight).tolist() == pytest.approx([0.49 / 0.19, 2.0])


# ---- what every rule must do --------------------------------------------------------------------------------------

VARIED = [[3.0, 4.0, 0.0], [1.0, 0.5, -0.2], [-0.1, 0.3, 2.0]]


@pytest.mark.parametrize("kind", RULES)
def test_the_order_of_the_terms_does_not_matter(kind: type[GradientRule]) -> None:
    order = [0, 2, 1]  # the base stays first
    steps = [[[x * (1 + step * i) for x in row] for i, row in enumerate(VARIED)] for step in range(3)]
    plain = weights_after(kind(3), steps, at=[1.0, 2.0, 3.0])
    turned = weights_after(kind(3), [[rows[i] for i in order] for rows in steps], at=[1.0, 2.0, 3.0])
    assert turned == pytest.approx([plain[i] for i in order], rel=1e-12)
    assert len(set(plain)) > 1 or kind is CosineGate


@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_what_a_units_change_of_one_term_does(kind: type[GradientRule], factor: float) -> None:
    """The weighted gradient of a rescaled term: the same under the balancing rules, not under GradNorm and the gate."""
    scaled = [VARIED[0], [x * factor for x in VARIED[1]], VARIED[2]]
    at = [1.0, 2.0, 3.0]
    alone, both = weights_after(kind(3), [VARIED], at=at), weights_after(kind(3), [scaled], at=at)
    if kind in (EnCodec, DBMTL):
        assert [both[0], both[1] * factor, both[2]] == pytest.approx(alone, rel=1e-5)
    elif kind is VQGAN:  # but for the paper's 1e-4
        assert both[1] * factor == pytest.approx(alone[1], rel=0.1)
    elif kind is LRAnnealing:
        assert (both[1] - 0.9) * factor == pytest.approx(alone[1] - 0.9, rel=1e-5)
    else:
        assert both == pytest.approx(alone)


@pytest.mark.parametrize("kind", RULES)
def test_the_gradient_applied_is_that_of_the_reported_weights(kind: type[GradientRule]) -> None:
    executor, w = executor_of(kind(3), start=[2.0, 0.5, 1.0]), nn.Parameter(torch.tensor([1.0, 2.0, 3.0]).double())
    for step in range(4):
        rows = torch.tensor(VARIED, dtype=torch.float64) * (1 + step)
        record = one_step(executor, w, rows.tolist())
        assert w.grad is not None
        wanted = torch.tensor(list(record.weights.values()), dtype=torch.float64) @ rows
        torch.testing.assert_close(w.grad, wanted, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("kind", RULES)
def test_grad_is_left_alone(kind: type[GradientRule]) -> None:
    """gradnorm-pytorch's second-order gradients land in .grad."""
    w, executor = nn.Parameter(torch.tensor([1.0, 2.0, 3.0])), executor_of(kind(3))
    total = executor(linear(w, VARIED), tap=w)
    assert w.grad is None and not list(executor.parameters())
    total.backward()
    assert executor.weighting.held.grad is None and not executor.weighting.held.requires_grad


@pytest.mark.parametrize("kind", RULES)
def test_nothing_is_computed_between_refreshes(kind: type[GradientRule], monkeypatch: pytest.MonkeyPatch) -> None:
    calls, real = [], taken.term_gradients
    monkeypatch.setattr(taken, "term_gradients", lambda *args: calls.append(1) or real(*args))
    executor, w = executor_of(kind(3, every=3)), nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
    seen, counts = [], []
    for step in range(8):
        seen.append(one_step(executor, w, [[x * (1 + step) ** i for x in row] for i, row in enumerate(VARIED)]).weights)
        counts.append(len(calls))
    assert counts == [1, 1, 1, 2, 2, 2, 3, 3]
    moves = [a != b for a, b in zip(seen, seen[1:], strict=False)]
    if kind is GradNorm:  # the weights move after the step they were measured on
        assert moves == [True, False, False, True, False, False, True]
    elif kind is not CosineGate:
        assert moves == [False, False, True, False, False, True, False]


@pytest.mark.parametrize("kind", RULES)
def test_parameters_given_at_the_start_serve_as_tap(kind: type[GradientRule]) -> None:
    w = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
    by_call, by_rule = executor_of(kind(3)), executor_of(kind(3, at=w))
    for executor in (by_call, by_rule):
        executor(linear(w, VARIED), tap=w if executor is by_call else None)
    assert by_call.weights == by_rule.weights and not list(by_rule.parameters())


@pytest.mark.parametrize("kind", RULES)
def test_a_need_that_is_not_met_is_one_line_with_the_fix(kind: type[GradientRule]) -> None:
    name, w = kind.__module__.rpartition(".")[2], nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
    with pytest.raises(ValueError, match=rf"^weighting '{name}' needs gradients: call executor\(losses, tap=") as error:
        executor_of(kind(3))(linear(w, VARIED))
    assert "\n" not in str(error.value)
    if kind in AGAINST_BASE:
        with pytest.raises(ValueError, match=rf"^weighting '{name}' needs base: say which term is the base"):
            executor_of(kind(3), base=None)(linear(w, VARIED), tap=w)


def test_a_tap_that_no_term_depends_on_is_told_at_once() -> None:
    w, other = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=r"^weighting 'encodec' needs gradients: no term depends on its tap; give"):
        executor_of(EnCodec(3))(linear(w, VARIED), tap=other)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EnCodec(2, every=0), "every is 0"),
        (lambda: GradNorm(2, rate=0.0), "positive rate"),
        (lambda: GradNorm(2, alpha=-1.0), "alpha"),
        (lambda: GradNorm(2, optimizer="lbfgs"), "'adam' or 'sgd'"),
        (lambda: EnCodec(2, decay=1.0), "decay"),
        (lambda: EnCodec(2, total=math.nan), "total"),
        (lambda: VQGAN(2, 0.0), "positive"),
        (lambda: LRAnnealing(2, 0.0), "alpha"),
        (lambda: LRAnnealing(2, statistic="median"), "'max' or 'mean'"),
        (lambda: DBMTL(2, limit=0.5), "limit"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# ---- rejected steps, accumulation, restarts -----------------------------------------------------------------------


def state_of(executor: LossExecutor) -> dict:
    return copy.deepcopy(executor.weighting.state_dict())


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(torch.nan_to_num(a[k]), torch.nan_to_num(b[k])) for k in a)


@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("fault", ["nan loss", "nan gradient"])
def test_a_rejected_step_leaves_no_trace(kind: type[GradientRule], fault: str) -> None:
    """One NaN poisons EnCodec's average for ever."""
    bad, good = (executor_of(kind(3)) for _ in range(2))
    w = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
    for executor in (bad, good):
        one_step(executor, w, VARIED)
        one_step(executor, w, [[2 * x for x in VARIED[0]], *VARIED[1:]])
    before = state_of(bad)
    for _ in range(2):
        losses = linear(w, [[5 * x for x in row] for row in VARIED[::-1]])
        losses["t1"] = losses["t1"] * math.nan if fault == "nan loss" else losses["t1"] + (w[0] * 0).sqrt()
        w.grad = None
        bad(losses, tap=w).backward()
        assert not bad.step(torch.optim.SGD([w], lr=0.0)).applied
        assert same(state_of(bad), before)
    for executor in (bad, good):
        one_step(executor, w, VARIED)
    assert bad.weights == good.weights and same(state_of(bad), state_of(good))


@pytest.mark.parametrize("kind", RULES)
def test_forward_alone_changes_no_state(kind: type[GradientRule]) -> None:
    executor, w = executor_of(kind(3)), nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
    before = state_of(executor)
    executor(linear(w, VARIED), tap=w)
    assert same(before, state_of(executor))


@pytest.mark.parametrize("kind", RULES)
def test_the_first_accumulated_batch_counts(kind: type[GradientRule], monkeypatch: pytest.MonkeyPatch) -> None:
    calls, real = [], taken.term_gradients
    monkeypatch.setattr(taken, "term_gradients", lambda *args: calls.append(1) or real(*args))
    whole, parts = (executor_of(kind(3)) for _ in range(2))
    w = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
    other = [[7 * x for x in row] for row in VARIED[::-1]]
    for factor in (1.0, 2.0, 3.0):
        rows = [[factor * x for x in VARIED[0]], *VARIED[1:]]
        one_step(whole, w, rows)
        calls.clear()
        parts(linear(w, rows), tap=w).backward()
        first = parts.weights
        parts(linear(w, other), tap=w).backward()
        assert parts.weights == first and len(calls) == 1
        assert parts.step(torch.optim.SGD([w], lr=0.0)).weights == whole.weights
        assert same(state_of(parts), state_of(whole))


@pytest.mark.parametrize("kind", RULES)
def test_save_load_continue_is_bit_equal(kind: type[GradientRule]) -> None:
    """The average of EnCodec's balancer is lost on resume."""

    def make() -> tuple[LossExecutor, nn.Parameter, torch.optim.Optimizer]:
        w = nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))
        return executor_of(kind(3, every=2)), w, torch.optim.Adam([w], lr=0.05)

    def train(executor: LossExecutor, w: nn.Parameter, optimizer: torch.optim.Optimizer, steps: range) -> list:
        seen = []
        for step in steps:
            optimizer.zero_grad()
            losses = [((w - step % 3) ** 2).sum(), (w[0] * w[1] - 1) ** 2, 100 * (w[2] - w[0]) ** 2 + 0.1]
            if step % 4 == 3:
                losses[2] = None
            executor(named(losses), tap=w).backward()
            seen.append((executor.step(optimizer).weights, w.tolist()))
        return seen

    straight = train(*(whole := make()), range(15))
    executor, w, optimizer = make()
    train(executor, w, optimizer, range(7))
    file = io.BytesIO()
    torch.save({"executor": executor.state_dict(), "w": w.detach(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    executor, w, optimizer = make()
    executor.load_state_dict(saved["executor"])
    optimizer.load_state_dict(saved["optimizer"])
    with torch.no_grad():
        w.copy_(saved["w"])
    assert train(executor, w, optimizer, range(7, 15)) == straight[7:]
    assert same(state_of(executor), state_of(whole[0]))
    assert len({str(weights) for weights, _ in straight}) > 1 or kind is CosineGate


@pytest.mark.parametrize("kind", RULES)
def test_a_state_loaded_in_mid_step_drops_what_was_pending(kind: type[GradientRule]) -> None:
    executor, w = executor_of(kind(3)), nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
    one_step(executor, w, VARIED)
    saved = copy.deepcopy(executor.state_dict())
    executor(linear(w, [[9 * x for x in row] for row in VARIED[::-1]]), tap=w)
    executor.load_state_dict(saved)
    fresh = executor_of(kind(3))
    fresh.load_state_dict(saved)
    assert one_step(executor, w, VARIED).weights == one_step(fresh, w, VARIED).weights


# ---- degenerate input ---------------------------------------------------------------------------------------------


def finite(weights: dict[str, float]) -> bool:
    return all(math.isfinite(weight) and weight >= 0 for weight in weights.values())


@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize(
    "steps",
    [
        [[[1.0, 0.0]]],
        [[[0.0, 0.0], [0.0, 0.0]]],
        [[[1.0, 0.0], [0.0, 0.0]], [[1.0, 0.0], [0.0, 2.0]]],
        [[[1.0, 0.0], None], [[1.0, 0.0], [0.0, 2.0]], [[1.0, 0.0], None], [None, [0.0, 1.0]]],
        [[None, [1.0, 0.0]], [[1.0, 1.0], [1.0, 0.0]]],
        [[[1e10, 0.0], [1e-10, 0.0]], [[1e-10, 0.0], [1e10, 0.0]]],
        [[[1e-30, 0.0], [1e-30, 1e-30]], [[1e18, 0.0], [1e-30, 1e-30]]],
        [[[1.0, 0.0], [-1.0, 0.0]], [[1.0, 0.0], [-1.0, 0.0]]],
        [[[1.0, i / 50] for i in range(50)], [[1.0, -i] for i in range(50)]],
    ],
    ids=["one term", "no gradient", "one without", "missing", "base missing", "1e±10", "tiny", "opposed", "K=50"],
)
def test_degenerate_gradients(kind: type[GradientRule], steps: list) -> None:
    executor, w = executor_of(kind(len(steps[0]))), nn.Parameter(torch.tensor([1.0, 0.5]))
    for rows in steps * 2:
        record = one_step(executor, w, rows)
        assert record.applied and finite(record.weights)
        assert w.grad is not None and torch.isfinite(w.grad).all()


@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_precision(kind: type[GradientRule], dtype: torch.dtype) -> None:
    executor, w = executor_of(kind(3)), nn.Parameter(torch.tensor([1.0, 2.0, 3.0], dtype=dtype))
    for _ in range(3):
        record = one_step(executor, w, VARIED)
    exact = weights_after(kind(3), [VARIED] * 3, at=[1.0, 2.0, 3.0])
    assert list(record.weights.values()) == pytest.approx(exact, rel={torch.float16: 2e-3}.get(dtype, 2e-2), abs=1e-9)
    assert w.grad is not None and w.grad.dtype == dtype


@pytest.mark.parametrize("kind", RULES)
def test_a_term_that_is_off_changes_nothing(kind: type[GradientRule]) -> None:
    with_off = weights_after(kind(4), [[*VARIED, [9.0, 9.0, 9.0]]] * 2, at=[1.0, 2.0, 3.0], start=[1.0, 1.0, 1.0, 0.0])
    assert with_off == pytest.approx([*weights_after(kind(3), [VARIED] * 2, at=[1.0, 2.0, 3.0]), 0.0])


def test_a_first_step_with_only_a_term_that_is_off_is_no_fault() -> None:
    executor, w = executor_of(EnCodec(3), start=[1.0, 1.0, 0.0]), nn.Parameter(torch.ones(3))
    executor(linear(w, [None, None, [1.0, 1.0, 1.0]]), tap=w)
    assert executor.weights == {"t0": 1.0, "t1": 1.0, "t2": 0.0}


# ---- faults of published code -------------------------------------------------------------------------------------


def test_gradnorm_pulls_up_the_term_that_trains_slowly() -> None:
    """gradnorm-pytorch's target uses r^(−α), which pulls up the fast one."""
    executor, w = executor_of(GradNorm(2)), nn.Parameter(torch.tensor([1.0, 1.0], dtype=torch.float64))
    for step in range(20):
        falls = 1 / (1 + step)
        losses = {"t0": w[0] + falls - 1, "t1": w[1] * 1.0}  # the same gradients; t0's loss falls, t1's stays
        executor(losses, tap=w).backward()
        executor.step(torch.optim.SGD([w], lr=0.0))
    assert executor.weights["t1"] > 1.1 > 0.9 > executor.weights["t0"]


def test_gradnorm_moves_the_state_it_keeps() -> None:
    """gradnorm-pytorch's masked lerp_ changes a copy."""
    rule = GradNorm(2)
    executor, w = executor_of(rule), nn.Parameter(torch.tensor([1.0, 2.0]))
    one_step(executor, w, [[3.0, 0.0], None])
    assert rule.first.nan_to_num(-1).tolist() == [3.0, -1.0] and rule.steps.tolist() == [1.0, 0.0]
    one_step(executor, w, [[3.0, 0.0], [0.0, 0.5]])
    assert rule.first.tolist() == [3.0, 1.0] and rule.held.sum() == pytest.approx(2.0)
    assert rule.held[1] > 1 > rule.held[0]


@pytest.mark.parametrize("rate", [0.025, 10.0])
def test_gradnorms_weights_stay_positive_and_keep_their_sum(rate: float) -> None:
    executor, w = executor_of(GradNorm(3, rate=rate)), nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
    for _ in range(100):
        record = one_step(executor, w, VARIED)
        assert sum(record.weights.values()) == pytest.approx(3.0) and min(record.weights.values()) > 0


def test_encodec_lets_no_gradient_that_is_not_finite_into_its_average() -> None:
    rule = EnCodec(2)
    executor, w = executor_of(rule), nn.Parameter(torch.tensor([1.0, 2.0]))
    one_step(executor, w, [[2.0, 0.0], [0.0, 4.0]])
    before = executor.weights
    y = w * 1.0
    losses = {"t0": 2 * y[0] + (y[1] * 0).sqrt(), "t1": 4 * y[1]}  # finite losses, no finite gradient of t0
    total = executor(losses, tap=y)
    assert torch.isfinite(total) and executor.weights == pytest.approx(before)


def test_encodec_does_not_blow_up_a_term_without_gradient() -> None:
    """EnCodec scales it by up to 1e12, and by that much it comes back."""
    rule = EnCodec(2)
    executor, w = executor_of(rule), nn.Parameter(torch.tensor([1.0, 2.0]))
    for _ in range(3):
        weights = one_step(executor, w, [[2.0, 0.0], [0.0, 0.0]]).weights
    assert weights == pytest.approx({"t0": 0.25, "t1": 1.0})
    assert one_step(executor, w, [[2.0, 0.0], [0.0, 8.0]]).weights == pytest.approx({"t0": 0.25, "t1": 1 / 16})
    for _ in range(2000):  # zeros are no evidence: the weight does not creep up on them
        weights = one_step(executor, w, [[2.0, 0.0], [0.0, 0.0]]).weights
    assert weights["t1"] == pytest.approx(1 / 16)
    assert balanced_weights(torch.ones(2), torch.tensor([1.0, 1e-30]), 1.0, 1e6).max() <= 1e6


def test_encodec_goes_on_without_a_term_it_has_seen() -> None:
    """In EnCodec a term seen before and then missing raises. Its share goes to the others meanwhile."""
    rule = EnCodec(2)
    executor, w = executor_of(rule), nn.Parameter(torch.tensor([1.0, 2.0]))
    one_step(executor, w, [[2.0, 0.0], [0.0, 4.0]])
    assert one_step(executor, w, [[2.0, 0.0], None]).weights["t0"] == pytest.approx(0.5)
    assert one_step(executor, w, [[2.0, 0.0], [0.0, 4.0]]).weights == pytest.approx({"t0": 0.25, "t1": 0.125})


def test_vqgans_norms_do_not_underflow_in_half_precision() -> None:
    """In taming-transformers the small norm is 0 under fp16 and the weight runs to its cap."""
    small = 6e-5  # its square is below float16's least number
    executor, w = executor_of(VQGAN(2)), nn.Parameter(torch.ones(4, dtype=torch.float16))
    assert float((torch.full((4,), small, dtype=torch.float16) ** 2).sum()) == 0
    found = one_step(executor, w, [[small] * 4, [small] * 4]).weights["t1"]
    assert found == pytest.approx(0.8 * 2 * small / (2 * small + 1e-4), rel=1e-2)


def test_vqgan_holds_a_term_that_is_not_switched_on_yet() -> None:
    executor, w = executor_of(VQGAN(2)), nn.Parameter(torch.tensor([1.0, 2.0]))
    assert one_step(executor, w, [[2.0, 0.0], [0.0, 0.0]]).weights["t1"] == 1.0
    assert one_step(executor, w, [[0.0, 0.0], [0.0, 2.0]]).weights["t1"] == 1.0
    assert adaptive_weights(torch.tensor(1e9), torch.tensor([0.0]), 0.8).item() == pytest.approx(8e3)


def test_lr_annealing_helps_the_term_with_the_smaller_gradient_and_is_bounded() -> None:
    """PINA's "NTK" weights are inverted against the paper, and its ratio has neither eps nor bound."""
    found = weights_after(LRAnnealing(3), [[[8.0, 8.0], [1.0, 1.0], [0.1, 0.1]]] * 5)
    assert found[0] == 1.0 < found[1] < found[2]
    assert annealed(torch.ones(1), torch.tensor(1.0), torch.tensor([0.0]), 0.1, 1e4).item() == pytest.approx(1000.9)
    assert weights_after(LRAnnealing(2), [[[1.0, 1.0], [0.0, 0.0]]] * 3) == [1.0, 1.0]


def test_entry_sizes_count_what_a_term_does_not_reach_as_zeros() -> None:
    a, b = (nn.Parameter(torch.tensor(v)) for v in ([1.0, 2.0], [[3.0]]))
    terms = taken.TermGradients([a.sum() * -4, b.sum() + a[0], None], torch.tensor([1.0, 2.0, 1.0]).double(), [a, b])
    greatest, means = entry_sizes(terms)
    assert greatest.tolist() == [4.0, 2.0, 0.0] and means.tolist() == pytest.approx([8 / 3, 4 / 3, 0.0])


def test_entry_sizes_in_mixed_precision() -> None:
    tap = [nn.Parameter(torch.ones(2, dtype=kind)) for kind in (torch.float16, torch.float32, torch.float64)]
    terms = [tap[0].sum() * 60000, tap[1].sum().double() + tap[2].sum() * 3]
    greatest, means = entry_sizes(taken.TermGradients(terms, torch.ones(2).double(), tap))
    assert greatest.tolist() == pytest.approx([60000, 3.0], rel=1e-3)
    assert means.tolist() == pytest.approx([20000, 8 / 6], rel=1e-3)


def test_weights_reported_are_those_applied_under_the_default_guards() -> None:
    """LibMTL logs weights that it did not apply."""
    executor = LossExecutor({"t0": 1.0, "t1": 1.0}, weighting=EnCodec(2))
    w = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
    for size in (1.0, 1e3, 1e-2, 50.0):
        record = one_step(executor, w, [[size, 0.0], [0.0, 1 / size]])
        assert w.grad is not None
        wanted = [record.weights["t0"] * size, record.weights["t1"] / size]
        assert w.grad.tolist() == pytest.approx(wanted, rel=1e-6)


def test_max_norm_weights_are_bounded() -> None:
    assert max_norm_weights(torch.ones(2), torch.tensor([1.0, 1e-30]), 1e6).max() <= 1e6


def test_a_gate_at_zero_is_closed() -> None:
    assert gate(torch.tensor([0.0, 1e-9, -1e-9]), smooth=False).tolist() == [0.0, 1.0, 0.0]


def test_rules_multiply() -> None:
    """In a product both see the same gradients, and under accumulation each commits its own first batch."""
    w = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
    executor = LossExecutor(named([1.0] * 3), weighting=EnCodec(3) * VQGAN(3), base="t0", guards=FREE)
    alone = [weights_after(kind(3), [VARIED] * 2, at=[1.0, 2.0, 3.0]) for kind in (EnCodec, VQGAN)]
    for _ in range(2):
        weights = one_step(executor, w, VARIED).weights
    assert list(weights.values()) == pytest.approx([a * b for a, b in zip(*alone, strict=True)], rel=1e-5)
