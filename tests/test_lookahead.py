"""The schedule, and the look-ahead on a live graph against brute force."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptive_loss import Guards, LossExecutor, MetaController
from adaptive_loss.lookahead import GraphLost, Schedule, measure, probe_value
from adaptive_loss.meta_controller import RULE
from adaptive_loss.probes import held_out


@pytest.mark.parametrize("total", [54, 60, 100, 199, 200, 201, 1000, 1170, 10_000, 123_457])
def test_the_number_of_look_aheads_does_not_depend_on_the_length(total: int) -> None:
    schedule = Schedule()
    due = [step for step in range(total) if schedule.due(step, total)]
    edge = min(50, total // 4)
    assert sum(step <= edge for step in due) == 12
    assert sum(step > edge for step in due) == 20
    late = [step for step in due if step > edge]
    gaps = {b - a for a, b in zip(late, late[1:], strict=False)}
    assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("total", [1000, None])
def test_a_term_that_comes_in_mid_run_brings_early_look_aheads_of_its_own(total: int | None) -> None:
    schedule = Schedule()
    due = [step for step in range(600, 1000) if schedule.due(step, total, arrived=600)]
    plain = [step for step in range(600, 1000) if schedule.due(step, total)]
    assert due[0] == 601 and sum(step <= 650 for step in due) == 12
    assert [step for step in due if step > 650] == [step for step in plain if step > 650]


@pytest.mark.parametrize("total", [1, 2, 3, 4, 7, 13, 33, 53])
def test_short_runs_look_ahead_on_at_most_every_step(total: int) -> None:
    due = [step for step in range(total) if Schedule().due(step, total)]
    assert 0 not in due and len(due) <= 32
    assert total == 1 or due


def test_unknown_length_looks_ahead_at_growing_distances() -> None:
    schedule = Schedule()
    due = [step for step in range(100_000) if schedule.due(step, None)]
    assert sum(step <= 50 for step in due) == 12
    late = [step for step in due if step > 50]
    # 20/3 an e-fold beyond step 50: ln(100,000 / 50) · 20/3 = 50.7.
    assert 49 <= len(late) <= 52
    assert late[-1] - late[-2] > 10 * (late[3] - late[2])


def net(seed: int = 0) -> tuple[nn.Sequential, Tensor, Tensor]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    return model, torch.randn(16, 4), torch.randint(3, (16,))


def terms_of(model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor | None]:
    out = model(x)
    return [F.cross_entropy(out, y), out.square().mean(), (out[:, 0] - 1).abs().mean(), None]


def adam_after(model: nn.Module, x: Tensor, y: Tensor, steps: int = 3) -> torch.optim.Adam:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        live = [loss for loss in terms_of(model, x, y) if loss is not None]
        torch.stack(live).sum().backward()
        optimizer.step()
    optimizer.zero_grad()
    return optimizer


def flat(gradients: list[Tensor]) -> Tensor:
    return torch.cat([g.double().flatten() for g in gradients])


WEIGHTS = torch.tensor([1.0, 0.3, 7.0, 2.0], dtype=torch.float64)


def test_measure_equals_brute_force_with_flattened_vectors() -> None:
    model, x, y = net()
    optimizer = adam_after(model, x, y)
    parameters = list(model.parameters())

    def probe() -> Tensor:
        return F.cross_entropy(model(x.flip(1)), y)

    found = measure(terms_of(model, x, y), WEIGHTS, probe, parameters, optimizer, 0)
    assert found is not None
    diagonal = flat(
        [1 / ((optimizer.state[p]["exp_avg_sq"].double() / (1 - 0.999**3)).sqrt() + 1e-8) for p in parameters]
    )
    live = [loss for loss in terms_of(model, x, y) if loss is not None]
    v = [
        w * flat(list(torch.autograd.grad(loss, parameters, retain_graph=True)))
        for w, loss in zip(WEIGHTS, live, strict=False)
    ]
    g_p = flat(list(torch.autograd.grad(probe(), parameters)))
    whole = v[0] + v[1] + v[2]

    def inner(a: Tensor, b: Tensor) -> float:
        return float((a * diagonal) @ b)

    gains = [
        inner(g_p, vi - inner(vi, whole) / inner(whole, whole) * whole) / math.sqrt(inner(g_p, g_p) * inner(vi, vi))
        for vi in v
    ]
    assert found.gain[:3].tolist() == pytest.approx(gains, rel=1e-4, abs=1e-6)
    assert math.isnan(float(found.gain[3]))
    cosines = [inner(v[0], vi) / math.sqrt(inner(v[0], v[0]) * inner(vi, vi)) for vi in v]
    assert found.cos_base[:3].tolist() == pytest.approx(cosines, rel=1e-4, abs=1e-6)
    lengths = torch.tensor([math.sqrt(inner(vi, vi)) for vi in v], dtype=torch.float64)
    assert found.share[:3].tolist() == pytest.approx((lengths / lengths.sum()).tolist(), rel=1e-4)
    assert float(lengths @ found.gain[:3]) == pytest.approx(0, abs=1e-5 * float(lengths.sum()))
    assert found.objective == pytest.approx(float(probe().detach()))


@pytest.mark.parametrize("term", [0, 1, 2])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_sign_agrees_with_finite_differences_of_the_probe(term: int, seed: int) -> None:
    """More of term i at an unchanged step length ‖step‖_P⁻¹ lowers the probe where hᵢ > 0."""
    model, x, y = net(seed)
    parameters = list(model.parameters())

    def probe() -> Tensor:
        return F.cross_entropy(model(x.flip(1)), y)

    losses = [loss for loss in terms_of(model, x, y) if loss is not None]
    weights = WEIGHTS[:3].clone()
    found = measure([*losses], weights, probe, parameters, None, 0)
    assert found is not None
    gradients = [[g.double() for g in torch.autograd.grad(loss, parameters, retain_graph=True)] for loss in losses]
    origin = [p.detach().clone() for p in parameters]

    def after(factor: float) -> float:
        w = weights.clone()
        w[term] *= factor
        step = [sum(wi * g[k] for wi, g in zip(w.tolist(), gradients, strict=True)) for k in range(len(origin))]
        length = math.sqrt(sum(float((torch.as_tensor(part) ** 2).sum()) for part in step))
        twin = net(seed)[0].double()
        with torch.no_grad():
            for q, p, part in zip(twin.parameters(), origin, step, strict=True):
                q.copy_(p.double() - 1e-4 * part / length)
            return float(F.cross_entropy(twin(x.flip(1).double()), y))

    slope = (after(1.01) - after(0.99)) / 0.02
    assert slope * float(found.gain[term]) < 0


def test_measure_writes_no_grad_and_draws_from_no_global_generator() -> None:
    model, x, y = net()
    with_dropout = nn.Sequential(model, nn.Dropout(0.5))

    def probe() -> Tensor:
        return F.cross_entropy(with_dropout(x), y) + 0 * torch.rand(())

    before = torch.get_rng_state()
    measure(terms_of(model, x, y), WEIGHTS, probe, list(model.parameters()), None, 0)
    probe_value(probe)
    assert torch.equal(before, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())


def test_batch_normalisation_statistics_stay_and_so_do_modes() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
    model[2].eval()
    _, x, y = net()
    out = model(x)
    losses: list[Tensor | None] = [F.cross_entropy(out, y), out.square().mean()]
    probe = held_out(lambda x, y: F.cross_entropy(model(x), y), (x, y), batch_size=8, model=model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = measure(losses, WEIGHTS[:2], probe, list(model.parameters()), None, 0)
    assert found is not None and torch.isfinite(found.gain).all()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert [m.training for m in model] == [True, True, False]


@pytest.mark.parametrize(
    ("probe", "what"),
    [
        (lambda: 1.0, "0-dim tensor"),
        (lambda: torch.tensor(1.0), "gradient"),
        (lambda: torch.ones(3, requires_grad=True), "0-dim"),
        (lambda: None, "probe"),
    ],
)
def test_a_bad_probe_says_what_it_must_return(probe: Callable[[], Tensor], what: str) -> None:
    model, x, y = net()
    with pytest.raises(ValueError, match=what):
        measure(terms_of(model, x, y), WEIGHTS, probe, list(model.parameters()), None, 0)
    with pytest.raises(ValueError, match=what):
        probe_value(probe)


def test_a_probe_works_under_no_grad() -> None:
    model, x, y = net()
    with torch.no_grad():
        assert probe_value(lambda: F.cross_entropy(model(x), y)) > 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_non_finite_probe_gives_nothing(value: float) -> None:
    model, x, y = net()
    parameters = list(model.parameters())
    assert measure(terms_of(model, x, y), WEIGHTS, lambda: model(x).sum() * value, parameters, None, 0) is None
    # A finite value with a gradient that is not: d√u/du at 0.
    assert measure(terms_of(model, x, y), WEIGHTS, lambda: (model(x).sum() * 0).sqrt(), parameters, None, 0) is None


def test_a_probe_that_reaches_no_parameter_counts_for_nothing() -> None:
    model, x, y = net()
    found = measure(
        terms_of(model, x, y), WEIGHTS, lambda: torch.ones((), requires_grad=True), list(model.parameters()), None, 0
    )
    assert found is not None and found.gain[:3].tolist() == [0.0] * 3


def test_a_freed_graph_is_lost() -> None:
    model, x, y = net()
    losses = terms_of(model, x, y)
    torch.stack([loss for loss in losses if loss is not None]).sum().backward()
    with pytest.raises(GraphLost):
        measure(losses, WEIGHTS, lambda: model(x).sum(), list(model.parameters()), None, 0)


def test_an_absent_base_leaves_the_whole_gradient_as_reference() -> None:
    model, x, y = net()
    losses = [None, *terms_of(model, x, y)[1:]]
    found = measure(losses, WEIGHTS, lambda: model(x).square().sum(), list(model.parameters()), None, 0)
    assert found is not None
    assert torch.isnan(found.cos_base[0]) and torch.isfinite(found.cos_base[1:3]).all()


# ---- inside the executor ------------------------------------------------------------------------------------------


class Refusing(torch.autograd.Function):
    """The identity, whose backward may run once only, as a compiled graph's."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[override]
        if Refusing.refuse:
            raise RuntimeError("donated buffers")
        return grad

    refuse = True


def train(executor: LossExecutor, wrap: Callable[[Tensor], Tensor] = lambda t: t, steps: int = 30) -> Tensor:
    """Train two numbers; where they end."""
    w = nn.Parameter(torch.tensor([1.0, -1.0]))
    optimizer = torch.optim.Adam([w], lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        Refusing.refuse = True
        total = executor({"fit": wrap((w - 1).square().sum()), "size": w.square().sum()})
        Refusing.refuse = False
        total.backward()
        executor.step(optimizer)
    return w.detach().clone()


def test_a_lost_graph_warns_once_and_training_goes_on() -> None:
    executor = LossExecutor(
        {"fit": 1.0, "size": 1.0},
        base="fit",
        modulators=[MetaController(RULE)],
        probe=lambda: torch.ones((), requires_grad=True),
        total_steps=30,
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(executor, Refusing.apply)
    assert len([w for w in caught if "look-ahead" in str(w.message)]) == 1
    assert executor.signals.step == 30 and executor.signals.look_aheads == 0
    assert executor.weights == {"fit": 1.0, "size": 1.0}


def test_without_look_aheads_the_controller_still_acts_on_training_signals() -> None:
    executor = LossExecutor(
        {"fit": 1.0, "size": 1.0},
        base="fit",
        modulators=[MetaController(replace(RULE, drift=(-1.0,) * 6))],
        probe=lambda: torch.ones((), requires_grad=True),
        total_steps=210,
    )
    with pytest.warns(UserWarning, match="training signals alone"):
        train(executor, Refusing.apply, steps=210)
    assert executor.weights["size"] != 1.0


def test_a_non_finite_probe_changes_no_weight() -> None:
    nan = held_out(lambda x: (x * math.nan).sum().requires_grad_(), torch.ones(4))
    executor = LossExecutor(
        {"fit": 1.0, "size": 1.0}, base="fit", modulators=[MetaController(RULE)], probe=nan, total_steps=30
    )
    adaptive = train(executor)
    plain = train(LossExecutor({"fit": 1.0, "size": 1.0}, base="fit", total_steps=30))
    assert executor.signals.look_aheads == 0 and executor.skipped_steps == 0
    assert torch.equal(adaptive, plain)


def test_a_term_that_is_off_does_not_stop_the_look_ahead() -> None:
    w = nn.Parameter(torch.ones(2))
    executor = LossExecutor(
        {"fit": 1.0, "off": 0.0},
        base="fit",
        modulators=[MetaController(RULE)],
        probe=lambda: w.sum(),
        total_steps=10,
        guards=Guards(),
    )
    optimizer = torch.optim.SGD([w], lr=0.1)
    for step in range(10):
        losses = {"off": w.sum()} if step == 3 else {"fit": w.square().sum(), "off": w.sum()}
        optimizer.zero_grad()
        executor(losses).backward()
        executor.step(optimizer)
    assert executor.weights == {"fit": 1.0, "off": 0.0}


def test_a_graph_that_is_lost_only_when_the_optimizer_is_known_warns_too(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.tensor(2.0))
    executor = LossExecutor(
        {"fit": 1.0, "size": 1.0}, base="fit", modulators=[MetaController(RULE)], probe=lambda: (a - b).square()
    )
    optimizers = [torch.optim.SGD([p], lr=0.1) for p in (a, b)]  # neither moves all, so neither is the executor's
    monkeypatch.setattr("adaptive_loss.lookahead.is_split", lambda parameter: True)
    with pytest.warns(UserWarning, match="cannot be kept for a look-ahead") as told:
        for _ in range(4):
            executor({"fit": (a - 3).square() + b.square(), "size": a.square()}).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    assert sum("fully_shard has split" in str(warning.message) for warning in told) == 1
    assert executor.signals.step == 4 and executor.signals.look_aheads == 0
