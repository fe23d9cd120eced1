"""Terms in one unit: the same weight means the same, however a loss was reduced and however large the image."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from adaptive_loss import LossExecutor, Reduction
from adaptive_loss.units import KINDS

B, D = 6, 20
LOGITS = torch.randn(B, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
PIXELS = torch.rand(B, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def reduced(kind: str) -> float:
    nats = F.binary_cross_entropy_with_logits(LOGITS, PIXELS, reduction="none")
    return {
        "nats": nats.sum(1).mean(),
        "bits": nats.sum(1).mean() / math.log(2),
        "mean": nats.mean(),
        "bits_per_dimension": nats.mean() / math.log(2),
        "batch_sum": nats.mean(1).sum(),
        "sum": nats.sum(),
    }[kind].item()


@pytest.mark.parametrize("kind", KINDS)
def test_every_reduction_gives_the_same_nats(kind: str) -> None:
    found = reduced(kind) * Reduction(kind, dimensions=D, examples=B).factor  # type: ignore[arg-type]
    assert found == pytest.approx(reduced("nats"), rel=1e-12)


def test_the_executor_reads_terms_in_nats_per_example() -> None:
    executor = LossExecutor(
        {"rec": 1.0, "kl": 0.5},
        base="rec",
        reductions={"rec": Reduction("mean", dimensions=10), "kl": Reduction("sum", examples=4)},
    )
    w = nn.Parameter(torch.tensor([2.0, 8.0]))
    total = executor({"rec": w[0], "kl": w[1]})
    total.backward()
    assert total.item() == 1.0 * 20 + 0.5 * 2
    assert w.grad is not None and w.grad.tolist() == [10.0, 0.125]
    assert executor.step(torch.optim.SGD([w], lr=0.1)).losses == {"rec": 20.0, "kl": 2.0}


@pytest.mark.parametrize("size", [8, 32])
def test_one_weight_balances_alike_at_every_size(size: int) -> None:
    dimensions = size * size
    executor = LossExecutor(
        {"rec": 1.0, "kl": 1.0}, base="rec", reductions={"rec": Reduction("mean", dimensions=dimensions)}
    )
    w = nn.Parameter(torch.tensor(1.0))
    nats_a_pixel, kl = 0.25, 12.0
    executor({"rec": w * nats_a_pixel, "kl": w * kl}).backward()
    losses = executor.step(torch.optim.SGD([w], lr=0.1)).losses
    assert losses["rec"] / dimensions == 0.25 and losses["kl"] == 12.0


def test_a_state_knows_its_unit() -> None:
    one = LossExecutor({"a": 1.0}, reductions={"a": Reduction("mean", dimensions=3)})
    with pytest.raises(ValueError, match="its reductions are 'a × 3', here ''"):
        LossExecutor({"a": 1.0}).load_state_dict(one.state_dict())


def test_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="unknown reduction 'average'; choose from: nats, bits, mean"):
        Reduction("average")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="dimensions 0"):
        Reduction("mean", dimensions=0)
    with pytest.raises(TypeError, match="the reduction of term 'a' is a str: give a Reduction"):
        LossExecutor({"a": 1.0}, reductions={"a": "sum"})  # type: ignore[dict-item]
    with pytest.raises(KeyError, match="the reduction 'kl' is not a term"):
        LossExecutor({"a": 1.0}, reductions={"kl": Reduction("mean")})
