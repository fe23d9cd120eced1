"""Faults of published code that no other file's tests have at heart; each test names whose fault it keeps away."""

from __future__ import annotations

import ast
import io
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from adaptive_loss import LossExecutor
from adaptive_loss.weighting.relobralo import ReLoBRaLo
from adaptive_loss.weighting.switch_on import SwitchOn

PACKAGE = Path(__file__).parents[1] / "adaptive_loss"
GONE = {"symeig", "lstsq", "eig", "solve", "matrix_rank", "chain_matmul"}
"""Functions of ``torch`` itself that torch 2 has dropped or is about to; ``torch.linalg`` has them."""


def called_on_torch(file: Path) -> set[str]:
    nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    found = (node for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name))
    return {node.attr for node in found if isinstance(node.value, ast.Name) and node.value.id == "torch"}


def test_nothing_calls_what_torch_2_has_dropped() -> None:
    """LibMTL's Aligned-MTL calls ``torch.symeig``, which is gone."""
    assert not GONE & {name for file in PACKAGE.rglob("*.py") for name in called_on_torch(file)}


def test_a_model_is_left_what_it_was() -> None:
    """LibMTL's model inherits from its weighting: here a model is what it was, and may serve two rules at once."""
    model = nn.Linear(2, 2)
    kind, keys, attributes = type(model), list(model.state_dict()), sorted(vars(model))
    for rule in ("gradnorm", "uncertainty"):
        executor = LossExecutor({"a": 1.0, "b": 1.0}, weighting=rule)
        optimizer = torch.optim.SGD([*model.parameters(), *executor.parameters()], lr=0.1)
        features = model(torch.ones(3, 2))
        executor({"a": features[:, 0].square().mean(), "b": features[:, 1].square().mean()}, tap=features).backward()
        assert executor.step(optimizer).applied
        assert not {id(p) for p in executor.parameters()} & {id(p) for p in model.parameters()}
    assert (type(model), list(model.state_dict()), sorted(vars(model))) == (kind, keys, attributes)


def lookback(executor: LossExecutor, steps: range) -> list[dict[str, float]]:
    """The weights of steps whose losses rise and fall, so that looking back to the first one shows."""
    seen, w = [], nn.Parameter(torch.tensor(1.0))
    for step in steps:
        executor({"a": w * (1 + step % 3), "b": w * (4 - step % 2)}).backward()
        seen.append(dict(executor.step(torch.optim.SGD([w], lr=0.0)).weights))
    return seen


def relobralo() -> LossExecutor:
    return LossExecutor({"a": 1.0, "b": 1.0}, weighting=ReLoBRaLo(2, alpha=0.5, beta=0.5), seed=3)


def test_the_lookback_is_the_same_on_every_rank() -> None:
    """NVIDIA's ReLoBRaLo draws from the global generator, which differs by rank: here the executor's seed decides."""
    found = []
    for rank in range(2):
        torch.manual_seed(rank)
        torch.rand(rank)
        found.append(lookback(relobralo(), range(12)))
    assert found[0] == found[1] and len({str(weights) for weights in found[0]}) > 6


def test_relobralo_goes_on_after_a_restart() -> None:
    """NVIDIA's loses its weights on resume (physicsnemo#1719)."""
    straight, first, resumed = relobralo(), relobralo(), relobralo()
    wanted, file = lookback(straight, range(14)), io.BytesIO()
    lookback(first, range(6))
    torch.save(first.state_dict(), file)
    resumed.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    assert lookback(resumed, range(6, 14)) == wanted[6:]


def test_the_opponent_is_trained_when_its_gradient_switches_on() -> None:
    """taming-transformers multiplies the discriminator's own loss by the factor that is 0 before the start.

    Here only the generator's adversarial term waits; the critic, which has an executor of its own, learns meanwhile.
    """
    picture, critic = nn.Parameter(torch.tensor(0.0)), nn.Parameter(torch.tensor(0.0))
    rule = SwitchOn(2, "adversarial", at=5)
    generator = LossExecutor({"rec": 1.0, "adversarial": 1.0}, base="rec", weighting=rule)
    opponent = LossExecutor({"hinge": 1.0})
    ours, theirs = torch.optim.SGD([picture], lr=0.1), torch.optim.SGD([critic], lr=0.1)
    for _ in range(5):
        ours.zero_grad(), theirs.zero_grad()
        opponent({"hinge": (critic - 1).square()}).backward()
        opponent.step(theirs)
        generator({"rec": (picture - 2).square(), "adversarial": -picture * critic.detach()}).backward()
        assert generator.step(ours).weights["adversarial"] == 0.0
    assert critic.item() > 0.5 and rule.opponent


@pytest.mark.parametrize(("limit", "greatest"), [(None, 707.1), (10.0, 10.0)])
def test_nash_mtls_weights_are_bounded(limit: float | None, greatest: float) -> None:
    """nash-mtl#7 reports weights of 732: a short gradient asks for a long weight; here it has a bound to set."""
    pytest.importorskip("torchjd")
    from adaptive_loss.weighting.torchjd import torchjd_rule

    w = nn.Parameter(torch.ones(2, dtype=torch.float64))
    executor = LossExecutor({"a": 1.0, "b": 1.0}, weighting=torchjd_rule(2, "NashMTL", limit=limit))
    executor({"a": w[0], "b": 1e-3 * w[1]}, tap=w).backward()
    # G·w = 1/w asks for (1, 1000), which max_norm scales by 1/√2; the bound scales both.
    assert list(executor.weights.values()) == pytest.approx([greatest / 1000, greatest], rel=1e-3)
    assert isinstance(w.grad, Tensor) and w.grad.tolist() == pytest.approx([greatest / 1000] * 2, rel=1e-3)
