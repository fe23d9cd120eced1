"""Per-sample losses as many terms in one call: the same laws as for named terms, and nothing done term by term."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from adaptive_loss import LossExecutor, bucket_means
from adaptive_loss.buckets import Buckets


def executor_of(k: int, **options: object) -> LossExecutor:
    return LossExecutor({f"b{i}": 1 / k for i in range(k)}, **options)  # type: ignore[arg-type]


def draw(seed: int, batch: int, k: int) -> tuple[Tensor, Tensor]:
    dice = torch.Generator().manual_seed(seed)
    return torch.rand(batch, generator=dice), torch.randint(k, (batch,), generator=dice)


def test_means_are_those_of_a_loop() -> None:
    losses, index = draw(0, 500, 7)
    found = bucket_means(losses, index, 9)
    for k in range(9):
        mine = losses[index == k]
        assert found.present[k] == (len(mine) > 0)
        if len(mine):
            assert found.means[k].item() == pytest.approx(mine.mean().item(), rel=1e-6)


def test_the_total_and_its_gradient_are_those_of_named_terms() -> None:
    losses, index = draw(1, 64, 5)
    vector, names = nn.Parameter(torch.ones(64)), nn.Parameter(torch.ones(64))
    one, other = executor_of(6), executor_of(6)
    together = one(bucket_means(losses * vector, index, 6))
    apart = other({f"b{k}": (losses * names)[index == k].mean() for k in index.unique().tolist()})
    together.backward(), apart.backward()
    assert together.item() == pytest.approx(apart.item(), rel=1e-6)
    assert vector.grad is not None and names.grad is not None
    torch.testing.assert_close(vector.grad, names.grad)
    assert one.step(torch.optim.SGD([vector], lr=0.1)).losses.keys() == (
        other.step(torch.optim.SGD([names], lr=0.1)).losses.keys()
    )


def test_an_empty_bucket_is_an_absent_term() -> None:
    executor = executor_of(3)
    w = nn.Parameter(torch.ones(2))
    executor(bucket_means(w * torch.tensor([1.0, 2.0]), torch.tensor([0, 2]), 3)).backward()
    record = executor.step(torch.optim.SGD([w], lr=0.1))
    assert record.applied and record.losses == {"b0": 1.0, "b2": 2.0}


def test_a_broken_sample_rejects_the_step_and_names_its_bucket() -> None:
    executor = executor_of(3)
    w = nn.Parameter(torch.ones(3))
    executor(bucket_means(w * torch.tensor([1.0, math.nan, 2.0]), torch.tensor([0, 1, 2]), 3)).backward()
    record = executor.step(torch.optim.SGD([w], lr=0.1))
    assert not record.applied and record.term == "b1"
    assert w.tolist() == [1.0, 1.0, 1.0]


def test_what_an_empty_bucket_holds_does_not_reach_the_total() -> None:
    w = nn.Parameter(torch.ones(2))
    means = torch.stack([w[0], torch.tensor(math.nan)])
    total = executor_of(2)(Buckets(means, torch.tensor([True, False])))
    total.backward()
    assert total.item() == 0.5 and w.grad is not None and w.grad.tolist() == [0.5, 0.0]


def test_a_thousand_buckets_train_away_from_the_start() -> None:
    executor = executor_of(1000)
    w = nn.Parameter(torch.tensor(2.0))
    optimizer = torch.optim.SGD([w], lr=0.05)
    for step in range(80):  # beyond the spike gate's window
        optimizer.zero_grad()
        losses, index = draw(step, 128, 1000)
        executor(bucket_means((w - losses) ** 2, index, 1000)).backward()
        assert executor.step(optimizer).applied
    assert abs(w.item() - 0.5) < abs(2.0 - 0.5)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: bucket_means(torch.ones(3), torch.tensor([0, 1]), 2), ValueError, "must both be"),
        (lambda: bucket_means(torch.ones(2, 2), torch.ones(2, 2).long(), 2), ValueError, "must both be"),
        (lambda: bucket_means(torch.ones(2), torch.tensor([0.0, 1.0]), 2), TypeError, "give whole numbers"),
        (lambda: bucket_means(torch.ones(2), torch.tensor([0, 2]), 2), ValueError, "do not lie in"),
        (lambda: bucket_means(torch.ones(2), torch.tensor([-1, 0]), 2), ValueError, "do not lie in"),
        (lambda: Buckets(torch.ones(2), torch.ones(3).bool()), ValueError, "of one shape"),
        (lambda: Buckets(torch.ones(2).long(), torch.ones(2).bool()), TypeError, "floating-point"),
        (lambda: executor_of(3)(Buckets(live(2), torch.ones(2).bool())), ValueError, "there are 2 buckets"),
        (lambda: executor_of(2)(Buckets(torch.ones(2), torch.ones(2).bool())), ValueError, "no gradient"),
        (lambda: executor_of(2)(Buckets(live(2), torch.zeros(2).bool())), ValueError, "every bucket is empty"),
    ],
)
def test_what_cannot_be(call, error: type[Exception], message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        call()


def live(k: int) -> Tensor:
    return torch.ones(k, requires_grad=True)
