"""A small regression with a helpful, a harmful and a harmless auxiliary, trained under any modulators."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from adaptive_loss import LossExecutor
from adaptive_loss.events import Event
from adaptive_loss.gradients import LookAhead
from adaptive_loss.modulator import Modulator
from adaptive_loss.probes import held_out

WEIGHTS = {"fit": 1.0, "helpful": 1.0, "harmful": 1.0}


@dataclass
class Run:
    """What a run left."""

    parameters: Tensor
    executor: LossExecutor
    weights: list[dict[str, float]] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    looks: list[tuple[int, LookAhead]] = field(default_factory=list)


def train(
    modulators: Sequence[Modulator],
    *,
    steps: int = 120,
    weights: Mapping[str, float] = WEIGHTS,
    base: str | None = "fit",
    seed: int = 0,
    known_length: bool = True,
    probe: bool = True,
    epoch: int | None = None,
    pinned: Sequence[str] = (),
) -> Run:
    """Train a linear model by Adam; the executor's seed is ``seed``, the data are always the same."""
    dice = torch.Generator().manual_seed(1)
    x, truth = torch.randn(300, 8, generator=dice), torch.randn(8, 1, generator=dice)
    y = x @ truth + torch.randn(300, 1, generator=dice)
    clean, wrong = x @ truth, -3 * (x @ truth)
    w = nn.Parameter(torch.zeros(8, 1))

    def error(rows: slice, goal: Tensor) -> Tensor:
        return (x[rows] @ w - goal[rows]).square().mean()

    objective = held_out(lambda a, b: (a @ w - b).square().mean(), (x[200:], y[200:]), batch_size=32)
    executor = LossExecutor(
        weights,
        base=base,
        modulators=modulators,
        probe=objective if probe else None,
        total_steps=steps if known_length else None,
        seed=seed,
        pinned=pinned,
    )
    optimizer = torch.optim.Adam([w], lr=0.02)
    run = Run(w, executor)
    for step in range(steps):
        rows = slice(step * 20 % 200, step * 20 % 200 + 20)
        optimizer.zero_grad()
        losses = {"fit": error(rows, y), "helpful": error(rows, clean), "harmful": error(rows, wrong)}
        before = executor.signals.look_aheads
        executor({name: losses[name] for name in weights}).backward()
        run.weights.append(executor.weights)
        window = executor._window
        look = None if window is None else window.look
        executor.step(optimizer)
        if look is not None and executor.signals.look_aheads > before:
            run.looks.append((step, look))
        if epoch is not None and (step + 1) % epoch == 0:
            executor.end_epoch(select_loss=float((x[200:] @ w - y[200:]).square().mean().detach()))
        run.events += executor.drain_events()
    run.parameters = w.detach().clone()
    return run
