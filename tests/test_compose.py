"""Products of rules, and the shares that a user sets above a balancing rule."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adaptive_loss import LossExecutor
from adaptive_loss.buckets import Buckets
from adaptive_loss.weighting.base import Context, Weighting
from adaptive_loss.weighting.compose import Product
from adaptive_loss.weighting.dwa import DWA
from adaptive_loss.weighting.encodec import EnCodec
from adaptive_loss.weighting.fixed import Fixed
from adaptive_loss.weighting.shares import Shares, share_weights
from adaptive_loss.weighting.switch_on import SwitchOn
from adaptive_loss.weighting.uncertainty import Uncertainty
from adaptive_loss.weighting.vqgan import VQGAN


class InverseLoss(Weighting):
    """A balancing rule in one line, so that every weighted loss is 1."""

    def forward(self, losses: Tensor, context: Context) -> Tensor:
        return 1 / losses.nan_to_num(1.0)


class InverseNorm(Weighting):
    """The same for gradients."""

    needs = ("gradients",)

    def forward(self, losses: Tensor, context: Context) -> Tensor:
        assert context.gradients is not None
        return 1 / context.gradients.norms


def live(value: float) -> Tensor:
    return torch.tensor(value, requires_grad=True)


def test_shares_are_factors_of_mean_one() -> None:
    assert share_weights(torch.tensor([3.0, 1.0, 0.0])).tolist() == [2.25, 0.75, 0.0]


def test_shares_hold_above_a_rule_that_balances() -> None:
    executor = LossExecutor({"a": 5.0, "b": 0.1}, weighting=Shares(2, [0.8, 0.2]) * InverseLoss(2))
    executor({"a": live(40.0), "b": live(0.03)})
    masses = executor.weights["a"] * 40, executor.weights["b"] * 0.03
    assert masses[0] / sum(masses) == pytest.approx(0.8)


def test_the_product_is_commutative_and_flat() -> None:
    shares, inverse, fixed = Shares(2, [3, 1]), InverseLoss(2), Fixed(2)
    one, other = shares * inverse * fixed, fixed * (inverse * shares)
    assert isinstance(one, Product) and len(one.parts) == len(other.parts) == 3
    context = Context(0, torch.ones(2, dtype=torch.bool), None, None, None)  # type: ignore[arg-type]
    losses = torch.tensor([2.0, 0.5], dtype=torch.float64)
    assert one(losses, context).tolist() == other(losses, context).tolist() == [0.75, 1.0]


def test_a_product_needs_what_its_parts_need() -> None:
    both = DWA(2) * InverseNorm(2)
    assert both.needs == ("epochs", "gradients") and both.name == "dwa * test_compose"
    executor = LossExecutor({"a": 1.0, "b": 1.0}, weighting=both)
    with pytest.raises(ValueError, match=r"needs gradients: call executor\(losses, tap=features\)"):
        executor({"a": live(1.0), "b": live(1.0)})


def test_gradients_reach_a_part_through_the_tap() -> None:
    p = nn.Parameter(torch.tensor([3.0, 4.0]))
    executor = LossExecutor({"a": 1.0, "b": 2.0}, weighting=Shares(2, [1, 3]) * InverseNorm(2))
    total = executor({"a": (p**2).sum(), "b": p.sum()}, tap=p)
    assert p.grad is None
    # ‖∇a‖ = 2·5, ‖∇b‖ = 2·√2 with the start weight 2; the shares ask for ½ and 1½ of lengths 1.
    assert executor.weights == pytest.approx({"a": 0.5 / 10, "b": 2 * 1.5 / (2 * math.sqrt(2))})
    total.backward()
    wanted = executor.weights["a"] * 2 * torch.tensor([3.0, 4.0]) + executor.weights["b"]
    assert p.grad is not None
    torch.testing.assert_close(p.grad, wanted)


def test_every_part_hears_of_epochs_and_steps_and_survives_a_restart() -> None:
    def build() -> LossExecutor:
        return LossExecutor({"a": 1.0, "b": 1.0}, weighting=Shares(2, [3, 1]) * DWA(2))

    executor = build()
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.0)
    for means in [(4.0, 2.0), (2.0, 2.0)]:
        executor({"a": live(means[0]), "b": live(means[1])}).backward()
        executor.step(optimizer)
        executor.end_epoch()
    saved = io.BytesIO()
    torch.save(executor.state_dict(), saved)
    again = build()
    again.load_state_dict(torch.load(io.BytesIO(saved.getvalue()), weights_only=True))
    for one in (executor, again):
        one({"a": live(1.0), "b": live(1.0)})
    golden = 2 / (1 + math.exp(0.25))  # DWA's weight of a falling term, r = (½, 1), T = 2
    assert executor.weights == again.weights == pytest.approx({"a": 1.5 * golden, "b": 0.5 * (2 - golden)})


def test_a_rule_that_learns_does_so_as_if_it_were_alone() -> None:
    # Balanced by uncertainty each term adds ½, so under shares of 3 to 1 they add ¾ and ¼ of the whole.
    executor = LossExecutor({"a": 1.0, "b": 1.0}, weighting=Shares(2, [3, 1]) * Uncertainty(2))
    optimizer = torch.optim.SGD(executor.parameters(), lr=0.5)
    for _ in range(200):
        optimizer.zero_grad()
        a, b = live(30.0), live(0.2)
        total = executor({"a": a, "b": b})
        total.backward()
        assert [a.grad.item(), b.grad.item()] == pytest.approx(list(executor.weights.values()))  # type: ignore[union-attr]
        executor.step(optimizer)
    masses = executor.weights["a"] * 30, executor.weights["b"] * 0.2
    assert masses == pytest.approx((0.75, 0.25), rel=1e-3)
    assert total.item() == pytest.approx(1.0 + (math.log(30) + math.log(0.2)) / 2, rel=1e-3)


@pytest.mark.parametrize("vector", [False, True])
def test_a_rule_that_learns_is_not_led_astray_while_a_term_waits_or_is_capped(vector: bool) -> None:
    def run(rule: Weighting) -> list[float]:
        executor = LossExecutor({"a": 1.0, "b": 1.0}, weighting=rule)
        optimizer = torch.optim.SGD(executor.parameters(), lr=0.1)
        for _ in range(12):
            optimizer.zero_grad()
            a, b = live(3.0), live(0.2)
            losses = Buckets(torch.stack([a, b]), torch.ones(2, dtype=torch.bool)) if vector else {"a": a, "b": b}
            executor(losses, tap=[a, b]).backward()
            executor.step(optimizer)
        return next(executor.parameters()).tolist()

    alone = run(Uncertainty(2))
    assert run(SwitchOn(2, "b", at=100) * Uncertainty(2)) == alone  # waits at 0
    assert run(SwitchOn(2, "b", at=0, share=0.01) * Uncertainty(2)) == alone


def test_rules_of_other_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="fixed is over 2 terms and dwa over 3"):
        Fixed(2) * DWA(3)
    with pytest.raises(TypeError):
        Fixed(2) * 2.0  # type: ignore[operator]


def test_one_rule_serves_one_executor_and_parts_have_one_tap() -> None:
    rule = DWA(2)
    LossExecutor({"a": 1.0, "b": 1.0}, weighting=rule)
    with pytest.raises(ValueError, match="this weighting 'dwa' belongs to another executor"):
        LossExecutor({"a": 1.0, "b": 1.0}, weighting=rule)
    here, there = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    assert (EnCodec(2, at=here) * VQGAN(2, at=here)).at == [here]
    with pytest.raises(ValueError, match="take gradients at different tensors"):
        EnCodec(2, at=here) * VQGAN(2, at=there)


def test_a_tap_that_needs_no_gradient_is_named() -> None:
    executor = LossExecutor({"a": 1.0}, weighting="encodec")
    with pytest.raises(ValueError, match=r"tap\[0\], of shape \[2\], needs no gradient"):
        executor({"a": live(1.0)}, tap=torch.ones(2))


@pytest.mark.parametrize(("tap", "kind"), [(nn.Linear(2, 2), "Linear"), ("features", "str")])
def test_a_tap_that_is_no_tensor_is_named(tap: Any, kind: str) -> None:
    with pytest.raises(TypeError, match=rf"tap\[0\] is a {kind}: give tensors"):
        LossExecutor({"a": 1.0}, weighting="encodec")({"a": live(1.0)}, tap=tap)


@pytest.mark.parametrize("shares", [[1.0], [1.0, -1.0], [0.0, 0.0], [1.0, math.nan]])
def test_shares_that_cannot_be(shares: list[float]) -> None:
    with pytest.raises(ValueError, match="give 2 finite numbers of at least 0, not all 0"):
        Shares(2, shares)


def test_shares_by_name_say_what_they_lack() -> None:
    executor = LossExecutor({"a": 1.0}, weighting="shares")
    with pytest.raises(ValueError, match="weighting 'shares' needs shares"):
        executor({"a": live(1.0)})
