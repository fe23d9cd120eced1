"""No non-finite number gets in, whatever the losses are.

    python -m tests.reliability.non_finite

Each trial is a short run of its own (rule, optimizer, precision, guards) whose losses are poisoned at random: values
that are NaN, infinite, huge, zero, negative or subnormal, terms that are missing, gradients that are NaN or huge
beneath a loss that looks fine. After every step parameters, optimizer state, weights and statistics are looked through,
and every step with a loss that is not finite must have been rejected by the name of such a term.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from adaptive_loss import Guards, LossExecutor
from adaptive_loss.weighting import weightings
from tests.reliability.rows import Row
from tests.test_weighting import executor_for

STEPS = 14
VALUES = (math.nan, math.inf, -math.inf, 1e38, -1e38, 0.0, -3.0, 1e-40, 5e-324)
OPTIMIZERS = (
    lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    lambda parameters: torch.optim.Adam(parameters, lr=0.1),
    lambda parameters: torch.optim.AdamW(parameters, lr=0.1, amsgrad=True),
    lambda parameters: torch.optim.RMSprop(parameters, lr=0.1, centered=True),
    lambda parameters: torch.optim.Adagrad(parameters, lr=0.1),
)


def poisoned(p: Tensor, dice: random.Random) -> Tensor | None:
    """A term's loss: bad in one way or another, or missing."""
    kind = dice.choice(("value", "slope", "missing", "nan gradient", "huge gradient"))
    if kind == "missing":
        return None
    if kind == "nan gradient":
        return 1 + (p - p.detach()).abs().sum().sqrt()
    if kind == "huge gradient":
        return (p - p.detach()).sum() * dice.choice((1e18, 1e19, 1e38)) + 1
    value = dice.choice(VALUES)
    return p.sum() * 0 + value if kind == "value" else p.sum() * value


def executor_of(dice: random.Random) -> LossExecutor:
    """An executor of one to four terms: any rule, or fixed weights with unusual guards."""
    weights = {name: 10 ** dice.uniform(-3, 3) for name in "abcd"[: dice.randint(1, 4)]}
    if dice.random() < 0.5:
        return executor_for(dice.choice(weightings.names()), weights)
    guards = Guards(
        quarantine=dice.choice((None, 1, 3)),
        quarantine_steps=dice.choice((1, 3)),
        clip_norm=dice.choice((None, 1.0)),
        spikes=dice.random() < 0.5,
    )
    return LossExecutor(weights, base=dice.choice((None, "a")), guards=guards)


def numbers(state: object) -> Iterable[Tensor]:
    """Every tensor of floating-point numbers in a nest of containers."""
    if isinstance(state, Tensor):
        yield from [state] if state.is_floating_point() else []
    elif isinstance(state, dict):
        for part in state.values():
            yield from numbers(part)
    elif isinstance(state, (list, tuple)):
        for part in state:
            yield from numbers(part)


def stains(p: Tensor, optimizer: Optimizer, executor: LossExecutor) -> list[str]:
    """Where something is not finite; in the statistics NaN stands for what is not known yet."""
    held = {
        "parameters": [p.detach(), *(q.detach() for q in executor.parameters())],
        "optimizer": list(numbers(optimizer.state_dict()["state"])),
        "weights": [torch.tensor(list(executor.weights.values()))],
    }
    found = [name for name, parts in held.items() if not all(bool(torch.isfinite(part).all()) for part in parts)]
    known = numbers(executor.signals.state_dict())
    return [*found, *(["signals"] if any(bool(part.isinf().any()) for part in known) else [])]


def step(p: Tensor, optimizer: Optimizer, executor: LossExecutor, losses: dict[str, Tensor | None]) -> list[str]:
    """One step; what is wrong after it."""
    there = {name: loss.item() for name, loss in losses.items() if loss is not None}
    seen = set(there) - set(executor.quarantined) or set(
        there
    )  # alone, a term in quarantine is looked at like any other
    bad = [name for name in seen if not math.isfinite(there[name])]
    optimizer.zero_grad()
    try:
        executor(losses, tap=p).backward()  # type: ignore[arg-type]
        record = executor.step(optimizer)
    except RuntimeError as error:
        named = not bad or any(f"term {name!r}" in str(error) for name in bad)
        return [*stains(p, optimizer, executor), *([] if named else [f"unnamed: {error}"])]
    wrong = stains(p, optimizer, executor)
    if bad and (record.applied or record.cause != "loss" or record.term not in bad):
        wrong.append(f"{bad} not named but {record.term}: {record.reason}")
    if record.cause == "loss" and not bad:
        wrong.append(f"{record.term} blamed for nothing")
    return wrong


def stream(seed: int) -> list[str]:
    """One run; what went wrong in it."""
    dice = random.Random(seed)
    executor = executor_of(dice)
    p = nn.Parameter(torch.tensor([0.3, -0.2, 0.5], dtype=dice.choice((torch.float32, torch.float64, torch.bfloat16))))
    optimizer = dice.choice(OPTIMIZERS)([p, *executor.parameters()])
    share, wrong = dice.choice((0.05, 0.3, 0.8)), []
    for i in range(STEPS):
        plain = {name: (p * (1 + j)).square().sum() + 0.1 for j, name in enumerate(executor.terms.names)}
        losses = {name: poisoned(p, dice) if dice.random() < share else loss for name, loss in plain.items()}
        if all(loss is None for loss in losses.values()):
            losses = plain
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrong += [f"seed {seed}, step {i}: {what}" for what in step(p, optimizer, executor, losses)]
        if i % 5 == 4:
            executor.end_epoch()
    return wrong


def torture(trials: int = 10_000) -> Row:
    """The row of the table."""
    wrong = [what for seed in range(trials) if (what := stream(seed))]
    return Row("no non-finite gets in", trials, len(wrong), "; ".join(what[0] for what in wrong[:3]))


if __name__ == "__main__":
    print(torture())
