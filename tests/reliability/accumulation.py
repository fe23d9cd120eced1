"""Gradient accumulation: the gradient is that of the whole window, and statistics advance once an optimizer step.

    python -m tests.reliability.accumulation

Every rule, A ∈ {1, 2, 4, 8} batches a window and an epoch that ends with a partial one, in float64. The gradient that
the optimizer gets is compared with that of the whole window in one pass, under the weights that the executor reports;
between two optimizer steps signals, gate, history and rule must not move.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from adaptive_loss import LossExecutor
from adaptive_loss.weighting import weightings
from tests.reliability.problems import WEIGHTS, ThreeHeads
from tests.reliability.rows import Row
from tests.test_executor import same
from tests.test_weighting import executor_for

Part = tuple[Tensor, str]
"""A batch's inputs and the name of the term that is missing from it."""
SIZES = (1, 2, 4, 8)
ALLOWED = 1e-10


def windows(size: int) -> Iterator[int]:
    """Batches a window: three epochs of two whole windows and, but for A = 1, a partial one."""
    for _ in range(3):
        yield from (size, size)
        if size > 1:
            yield size - 1


def statistics(executor: LossExecutor) -> object:
    """All that must stand still between two optimizer steps."""
    return copy.deepcopy(dict(executor.state_dict()))


def whole_loss(net: ThreeHeads, parts: list[Part], weights: Mapping[str, float]) -> Tensor:
    """Σᵢ wᵢ · mean of Lᵢ over a window, each term from one pass over all the samples of the batches that have it."""
    total = torch.zeros((), dtype=torch.float64)
    for name, weight in weights.items():
        there = [x for x, without in parts if name != without]
        if there:
            total = total + weight * net(torch.cat(there))[0][name] * len(there) / len(parts)
    return total


def window_error(net: ThreeHeads, executor: LossExecutor, optimizer: torch.optim.Optimizer, parts: list[Part]) -> float:
    """Train on one window; the greatest relative error of a gradient, ∞ where something moved that must not."""
    optimizer.zero_grad()
    before, step = statistics(executor), executor.signals.step
    for x, without in parts:
        losses, features = net(x, without)
        (executor(losses, tap=features) / len(parts)).backward()
        if not same(before, statistics(executor)):
            return float("inf")
    given = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    wanted = torch.autograd.grad(whole_loss(net, parts, executor.weights), list(net.parameters()))
    executor.step(optimizer)
    if executor.signals.step != step + 1 or executor.history.steps != step + 1:
        return float("inf")
    scale = max(float(g.abs().max()) for g in wanted)
    return max(float((g - w).abs().max()) for g, w in zip(given, wanted, strict=True)) / max(scale, 1e-300)


def errors(rule: str, size: int, seed: int) -> list[float]:
    """The error of every window of a run."""
    net, executor, dice = ThreeHeads(seed).double(), executor_for(rule, WEIGHTS), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam([*net.parameters(), *executor.parameters()], lr=1e-2)
    found = []
    for i, batches in enumerate(windows(size)):
        inputs = torch.randn(batches, 6, 4, generator=dice, dtype=torch.float64)
        # Every third batch lacks a term.
        parts = [(x, "b" if j % 3 == 2 else "") for j, x in enumerate(inputs)]
        found.append(window_error(net, executor, optimizer, parts))
        if i % 3 == 2:
            executor.end_epoch(select_loss=1.0)
    return found


def torture(seeds: int = 5) -> Row:
    """The row of the table."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = {
            (rule, size, seed): errors(rule, size, seed)
            for rule in weightings.names()
            for size in SIZES
            for seed in range(seeds)
        }
    every = [error for run in found.values() for error in run]
    wrong = [f"{key}" for key, run in found.items() if max(run) > ALLOWED]
    note = f"{len(weightings.names())} rules, greatest gradient error {max(every):.1e}, 1e-10 allowed"
    return Row("accumulation", len(every), sum(e > ALLOWED for e in every), "; ".join([note, *wrong[:3]]))


if __name__ == "__main__":
    print(torture())
