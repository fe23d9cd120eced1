"""Mixed precision: an overflow skips one step and leaves no trace, and norms are taken in float32.

    python -m tests.reliability.mixed_precision

A hundred overflows under ``GradScaler("cpu")``, at random places of a run and some in a row, under several rules; then
bf16: autocast, and a model that is itself in bf16, whose gradient norm is compared with float64.
"""

from __future__ import annotations

import copy
import math
import random
import warnings

import torch
from torch import Tensor, nn

from adaptive_loss import LossExecutor
from tests.reliability.rows import Row
from tests.test_executor import same

RULES = ("fixed", "uncertainty", "dwa", "relobralo", "famo")
SKIPS = 100


def net_of(seed: int) -> nn.Module:
    """A small network."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))


def losses_of(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Two terms that do not vanish."""
    out = net(x)
    return {"fit": (out - x.sum(1, keepdim=True)).square().mean() + 0.1, "small": out.abs().mean() + 0.1}


def state(net: nn.Module, optimizer: torch.optim.Optimizer, executor: LossExecutor) -> object:
    """All that a skip must leave alone: everything but the count of skips and the scaler."""
    own = dict(executor.state_dict())
    own["_extra_state"] = {name: part for name, part in own["_extra_state"].items() if name != "skipped_steps"}
    return copy.deepcopy([dict(net.state_dict()), optimizer.state_dict(), own])


def overflows(rule: str, seed: int, skips: int) -> list[str]:
    """A run with ``skips`` overflows; what went wrong."""
    dice, x = random.Random(seed), torch.randn(32, 4, generator=torch.Generator().manual_seed(seed))
    net, executor = net_of(seed), LossExecutor({"fit": 1.0, "small": 0.3}, weighting=rule)
    optimizer = torch.optim.Adam([*net.parameters(), *executor.parameters()], lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**32, growth_interval=1)
    wrong, accepted = [], 0
    while executor.skipped_steps < skips and not wrong:
        bad, parts = dice.random() < 0.4, dice.choice((1, 2))
        before, scale = state(net, optimizer, executor), scaler.get_scale()
        optimizer.zero_grad()
        for _ in range(parts):
            scaler.scale(executor(losses_of(net, x)) / parts).backward()
        if bad:
            next(net.parameters()).grad[0, 0] = dice.choice((math.inf, -math.inf, math.nan))  # type: ignore[index]
        record = executor.step(optimizer, scaler=scaler)
        accepted += not bad
        if record.applied is bad or executor.signals.step != accepted:
            wrong.append(
                f"{rule}: overflow {bad}, applied {record.applied}, step {executor.signals.step} of {accepted}"
            )
        halved = scaler.get_scale() == scale / 2 and record.cause == "overflow"
        if bad and not (halved and same(before, state(net, optimizer, executor))):
            wrong.append(f"{rule}: an overflow left a trace, scale {scale:g} to {scaler.get_scale():g}")
    return wrong


def bf16(seed: int) -> list[str]:
    """Steps under autocast and in a bf16 model; what went wrong."""
    wrong = []
    for kind in (torch.float32, torch.bfloat16):
        net, executor = net_of(seed).to(kind), LossExecutor({"fit": 1.0, "small": 0.3})
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-2)
        for step in range(3):
            x = torch.randn(32, 4, generator=torch.Generator().manual_seed(step)).to(kind)
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=kind == torch.float32):
                losses = losses_of(net, x)
            executor(losses).backward()
            exact = math.hypot(*(float(p.grad.double().norm()) for p in net.parameters() if p.grad is not None))
            record = executor.step(optimizer)
            if not record.applied or abs(record.gradient_norm / exact - 1) > 1e-6:
                wrong.append(f"{kind}: norm {record.gradient_norm} for {exact}")
    return wrong


def torture(skips: int = SKIPS, seeds: int = 20) -> Row:
    """The row of the table."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrong = [what for i, rule in enumerate(RULES) for what in overflows(rule, i, skips)]
        wrong += [what for seed in range(seeds) for what in bf16(seed)]
    note = f"{skips} overflows under each of {len(RULES)} rules; norms of {seeds * 6} bf16 steps to 1e-6 of float64"
    return Row("mixed precision", len(RULES) * skips + seeds * 6, len(wrong), "; ".join([note, *wrong[:3]]))


if __name__ == "__main__":
    print(torture())
