"""Laws that every weighting rule obeys, ours and TorchJD's, away from its start: one suite over the whole catalogue."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator

import pytest
import torch
from test_weighting import executor_for, rule_for
from torch import Tensor, nn

from adaptive_loss import LossExecutor
from adaptive_loss.guards import Guards
from adaptive_loss.weighting import TORCHJD, weightings
from adaptive_loss.weighting.shares import Shares

OURS = weightings.names()
SOLVERS = [name for name in TORCHJD if name != "nash_mtl"]  # Nash-MTL solves slowly; its own tests are enough
WEIGHTS = {"a": 1.0, "b": 0.5, "c": 2.0}


FREE = Guards(rate_limit=None, share_cap=None, spikes=False)


@pytest.fixture(params=[*OURS, *SOLVERS])
def rule(request: pytest.FixtureRequest) -> str:
    if request.param in TORCHJD:
        pytest.importorskip("torchjd")
    return request.param


class Net(nn.Module):
    """A trunk and three heads on fixed data; its losses differ in scale and pull apart."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.trunk = nn.Sequential(nn.Linear(4, 8), nn.Tanh())
            self.heads = nn.ModuleList(nn.Linear(8, 1) for _ in WEIGHTS)
            self.data = torch.randn(6, 4)

    def forward(self) -> tuple[dict[str, Tensor], Tensor]:
        features = self.trunk(self.data)
        losses = [(head(features) - 1.5 * i).square().mean() * 10.0**i for i, head in enumerate(self.heads)]
        return dict(zip(WEIGHTS, losses, strict=True)), features


def optimizer_of(net: nn.Module, executor: LossExecutor, rate: float = 1e-3) -> torch.optim.Optimizer:
    return torch.optim.Adam([*net.parameters(), *executor.parameters()], lr=rate)


def steps(net: Net, executor: LossExecutor, optimizer: torch.optim.Optimizer, count: int) -> Iterator[dict[str, float]]:
    """Train; the weights of each step. Every third step is the end of an epoch, every fourth lacks term b."""
    for i in range(count):
        optimizer.zero_grad()
        losses, features = net()
        if i % 4 == 3:
            del losses["b"]
        executor(losses, tap=features).backward()
        assert executor.step(optimizer).applied
        if i % 3 == 2:
            executor.end_epoch(select_loss=1.0 / (i + 1))
        yield executor.weights


def test_the_gradient_applied_is_that_of_the_weights_reported(rule: str) -> None:
    net, executor = Net(), executor_for(rule, WEIGHTS)
    optimizer = optimizer_of(net, executor)
    for _ in steps(net, executor, optimizer, 7):
        pass
    optimizer.zero_grad()
    losses, features = net()
    parts = {
        name: torch.autograd.grad(loss, list(net.parameters()), retain_graph=True, allow_unused=True)
        for name, loss in losses.items()
    }
    executor(losses, tap=features).backward()
    for i, parameter in enumerate(net.parameters()):
        terms = [executor.weights[name] * part[i] for name, part in parts.items() if part[i] is not None]
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, torch.stack(terms).sum(0), rtol=1e-4, atol=1e-7)


def test_a_prior_holds_under_every_rule(rule: str) -> None:
    """Multiplied by shares, a rule gives what it gives alone times the shares, whatever it learns from."""
    shares, found = [1.0, 4.0, 2.5], []
    for prior in (False, True):
        net, weighting = Net(), rule_for(rule, WEIGHTS)
        targets = {"c": 2.0} if "targets" in weighting.needs else None
        weighting = Shares(3, shares) * weighting if prior else weighting
        executor = LossExecutor(WEIGHTS, base="a", targets=targets, weighting=weighting, guards=FREE, total_steps=4)
        # The model stays, so that both see the same losses; what a rule learns moves.
        learned = [{"params": list(executor.parameters()), "lr": 0.1}] if list(executor.parameters()) else []
        optimizer = torch.optim.SGD([{"params": list(net.parameters()), "lr": 0.0}, *learned])
        found.append(list(steps(net, executor, optimizer, 6)))
    for plain, with_prior in zip(*found, strict=True):
        wanted = [weight * 3 * share / sum(shares) for weight, share in zip(plain.values(), shares, strict=True)]
        assert list(with_prior.values()) == pytest.approx(wanted, rel=1e-6, abs=1e-11)


def test_the_order_of_the_terms_does_not_matter(rule: str) -> None:
    """Terms b and c change places, and what was made for each of them with it."""
    if rule in ("rlw", "pcgrad", "gradvac"):
        pytest.skip("its draws belong to places")
    turned = {"a": 1.0, "c": 0.5, "b": 2.0, "d": 1.0}
    straight, other = executor_for(rule, {name: turned[name] for name in "abcd"}), executor_for(rule, turned)
    for name in ("levels", "factors"):
        if hasattr(other.weighting, name):
            setattr(other.weighting, name, getattr(straight.weighting, name)[[0, 2, 1, 3]])
    rows = torch.tensor([[1.0, 0.2, 0.0], [0.5, -1.0, 0.3], [-0.2, 2.0, 1.0], [0.1, 0.4, -3.0]], dtype=torch.float64)
    p = nn.Parameter(torch.tensor([3.0, 2.0, -0.5], dtype=torch.float64))
    for step in range(5):
        losses = {
            name: (row * (1 + step * i) * p).sum() + 9 for i, (name, row) in enumerate(zip("abcd", rows, strict=True))
        }
        for executor in (straight, other):
            optimizer = torch.optim.SGD([p, *executor.parameters()], lr=0.0)
            executor(losses, tap=p).backward(retain_graph=True)
            assert executor.step(optimizer).applied
            if step % 2:
                executor.end_epoch(select_loss=1.0)
        assert other.weights == pytest.approx(straight.weights, rel=1e-3 if rule in TORCHJD else 1e-9, abs=1e-9)


def test_a_restart_continues_bit_for_bit(rule: str) -> None:
    net, executor = Net(), executor_for(rule, WEIGHTS)
    optimizer = optimizer_of(net, executor)
    list(steps(net, executor, optimizer, 9))
    file = io.BytesIO()
    torch.save({"net": net.state_dict(), "executor": executor.state_dict(), "adam": optimizer.state_dict()}, file)
    wanted = list(steps(net, executor, optimizer, 8))
    other, again = Net(), executor_for(rule, WEIGHTS)
    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    other.load_state_dict(saved["net"])
    again.load_state_dict(saved["executor"])
    second = optimizer_of(other, again)
    second.load_state_dict(saved["adam"])
    assert list(steps(other, again, second, 8)) == wanted
    for one, two in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def test_weights_stay_finite_and_positive_while_terms_come_and_go(rule: str) -> None:
    net, executor = Net(), executor_for(rule, WEIGHTS)
    for weights in steps(net, executor, optimizer_of(net, executor, 0.05), 30):
        assert all(math.isfinite(weight) and weight >= 0 for weight in weights.values())
        # A schedule may begin with nothing, and CAGrad stops on the Pareto front.
        assert sum(weights.values()) > 0 or rule in ("schedule", "cagrad")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_losses_of_any_precision(rule: str, dtype: torch.dtype) -> None:
    executor = executor_for(rule, WEIGHTS)
    p = nn.Parameter(torch.tensor([1.0, 2.0], dtype=dtype))
    for _ in range(3):
        losses = {"a": p.square().sum(), "b": (p - 3).square().sum(), "c": p.abs().sum()}
        total = executor(losses, tap=p)
        assert total.dtype == dtype and torch.isfinite(total)
        p.grad = None
        total.backward()
        assert p.grad is not None and torch.isfinite(p.grad).all()
        assert executor.step(torch.optim.SGD([p, *executor.parameters()], lr=0.0)).applied


def test_one_term(rule: str) -> None:
    executor = executor_for(rule, {"only": 2.0})
    p = nn.Parameter(torch.tensor([1.0, -2.0]))
    for _ in range(3):
        executor({"only": p.square().sum()}, tap=p).backward()
        executor.step(torch.optim.SGD([p, *executor.parameters()], lr=0.0))
    assert math.isfinite(executor.weights["only"]) and executor.weights["only"] >= 0


@pytest.mark.parametrize("name", OURS)
def test_many_terms(name: str) -> None:
    executor = executor_for(name, {f"t{i}": 1.0 + i % 3 for i in range(1000)})
    p = nn.Parameter(torch.linspace(0.5, 2.0, 10))
    for _ in range(2):
        executor({f"t{i}": p[i % 10] * (1 + i % 7) for i in range(1000)}, tap=p).backward()
        executor.step(torch.optim.SGD([p, *executor.parameters()], lr=0.0))
    assert all(math.isfinite(weight) and weight >= 0 for weight in executor.weights.values())


def test_accumulated_batches_share_the_first_one_s_weights(rule: str) -> None:
    net, executor = Net(), executor_for(rule, WEIGHTS)
    optimizer = optimizer_of(net, executor)
    list(steps(net, executor, optimizer, 4))
    seen = []
    for _ in range(2):
        losses, features = net()
        executor(losses, tap=features).backward()
        seen.append(executor.weights)
    assert seen[0] == seen[1]
    assert executor.step(optimizer).applied


def test_under_autocast(rule: str) -> None:
    net, executor = Net(), executor_for(rule, WEIGHTS)
    optimizer = optimizer_of(net, executor)
    for _ in range(3):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            losses, features = net()
        executor(losses, tap=features).backward()
        assert executor.step(optimizer).applied


@pytest.mark.parametrize("name", [n for n in OURS if "gradients" not in weightings.get(n)(3).needs])
def test_beside_a_compiled_model(name: str) -> None:
    plain, net = Net(), Net()
    compiled = torch.compile(net, backend="aot_eager")
    found = []
    for module in (plain, compiled):
        executor = executor_for(name, WEIGHTS)
        optimizer = optimizer_of(module, executor)
        for _ in range(3):
            optimizer.zero_grad()
            losses, _ = module()
            executor(losses).backward()
            assert executor.step(optimizer).applied
        found.append(executor.weights)
    assert found[0] == pytest.approx(found[1], rel=1e-4)


@pytest.mark.parametrize("name", ["fixed", "rlw", "dwa", "uncertainty"])
def test_a_compiled_step_is_compiled_once(name: str) -> None:
    """The executor's numbers change at every step, and would be compiled anew with them: it stays outside."""
    torch._dynamo.reset()
    net, executor = Net(), executor_for(name, WEIGHTS)
    optimizer = optimizer_of(net, executor)

    @torch.compile(backend="aot_eager")
    def step() -> None:
        losses, _ = net()
        executor(losses).backward()
        executor.step(optimizer)

    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(4):
            optimizer.zero_grad()
            step()
    assert executor.signals.step == 4


@pytest.mark.parametrize("name", [n for n in OURS if "gradients" in weightings.get(n)(3).needs])
def test_at_a_tap_only_k_tensors_of_its_size_are_kept(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net, executor = Net(), executor_for(name, WEIGHTS)
    optimizer = optimizer_of(net, executor)
    taken: list[Tensor] = []
    original = torch.autograd.grad

    def counted(*args: object, **kwargs: object) -> object:
        found = original(*args, **kwargs)  # type: ignore[arg-type]
        taken.extend(found)
        return found

    monkeypatch.setattr(torch.autograd, "grad", counted)
    for _ in range(2):
        losses, features = net()
        taken.clear()
        executor(losses, tap=features).backward()
        assert len(taken) <= len(WEIGHTS) and all(part.shape == features.shape for part in taken)
        assert executor.step(optimizer).applied
    assert all(buffer.numel() <= 100 for buffer in executor.buffers())
