"""How often a step waits for the device: once for the losses, once at the gradient gate, at most once for the rule."""

from __future__ import annotations

import pytest
import torch
from far import Far, Transfers
from test_weighting import executor_for
from torch import Tensor

from adaptive_loss import LossExecutor, bucket_means
from adaptive_loss.weighting import TORCHJD, weightings

WEIGHTS = {"a": 1.0, "b": 0.5, "c": 2.0}
OWN = 2
"""The executor's own: the losses in one, and the gradient's norm."""


def losses(features: Tensor, other: Tensor) -> dict[str, Tensor]:
    size = other.square().sum()
    return {
        "a": features.square().sum() + size,
        "b": 10 * (features - 1).square().sum() + size,
        "c": (features.sum() - 3).square() + 0.1,
    }


class Step:
    """Training steps of three terms over two far parameters, and the transfers of the last one."""

    def __init__(self, executor: LossExecutor) -> None:
        self.executor = executor
        self.w, self.v = (Far(torch.tensor(x)).requires_grad_() for x in ([1.0, 2.0, 3.0], [[1.0, 2.0], [0.5, 1.0]]))
        with Transfers():
            self.optimizer = torch.optim.SGD([self.w, self.v, *executor.parameters()], lr=0.01)

    def run(self, tap: str = "features") -> int:
        with Transfers() as transfers:
            self.optimizer.zero_grad()
            features = self.w * 1
            at = features if tap == "features" else [self.w, self.v]
            self.executor(losses(features, self.v), tap=at).backward()
            assert self.executor.step(self.optimizer).applied
        return len(transfers.seen)


@pytest.mark.parametrize("name", [*weightings.names(), *TORCHJD])
def test_a_rule_waits_for_the_device_at_most_once_a_step(name: str) -> None:
    """EnCodec's balancer waits once a loss."""
    if name in TORCHJD:
        pytest.importorskip("torchjd")
    executor = executor_for(name, WEIGHTS)
    step = Step(executor)
    reaches = "gradients" in executor.weighting.needs or any(True for _ in executor.parameters())
    assert [step.run() for _ in range(3)] == [OWN + reaches] * 3


@pytest.mark.parametrize("name", ["gradnorm", "lr_annealing", "cosine_gate"])
def test_so_it_is_at_many_parameters_and_not_at_all_between_refreshes(name: str) -> None:
    rule = weightings.get(name)(3, every=2)
    step = Step(LossExecutor(WEIGHTS, base="a", weighting=rule))
    assert [step.run("parameters") for _ in range(4)] == [OWN + 1, OWN, OWN + 1, OWN]


def test_buckets_come_in_one_transfer_empty_ones_included() -> None:
    executor = LossExecutor({f"b{i}": 1.0 for i in range(5)}, weighting="inverse_ema")
    w = Far(torch.ones(4)).requires_grad_()
    with Transfers() as transfers:
        optimizer = torch.optim.SGD([w], lr=0.1)
        executor(bucket_means(w * 2, Far(torch.tensor([0, 0, 3, 4])), 5)).backward()
        record = executor.step(optimizer)
    assert record.losses == {"b0": 2.0, "b3": 2.0, "b4": 2.0} and len(transfers.seen) == OWN


def test_what_is_far_is_computed_as_what_is_near() -> None:
    far, near = Step(executor_for("uncertainty", WEIGHTS)), executor_for("uncertainty", WEIGHTS)
    w, v = (torch.nn.Parameter(tensor.near.clone()) for tensor in (far.w, far.v))
    twin = torch.optim.SGD([w, v, *near.parameters()], lr=0.01)
    far.run()
    twin.zero_grad()
    near(losses(w * 1, v)).backward()
    near.step(twin)
    assert torch.equal(far.w.near, w) and far.executor.weights == near.weights
    for one, other in zip(far.executor.parameters(), near.parameters(), strict=True):
        assert torch.equal(one, other)
