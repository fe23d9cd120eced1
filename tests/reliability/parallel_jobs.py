"""What the ranks do in the tests of data parallel training: the same steps together, and once more in one process."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from test_weighting import executor_for
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from adaptive_loss import LossExecutor
from adaptive_loss.weighting.gradnorm import GradNorm
from adaptive_loss.weighting.switch_on import SwitchOn
from adaptive_loss.weighting.wind_down import WindDown

WEIGHTS = {"a": 1.0, "b": 0.5, "c": 2.0}
ROWS = 16
Absent = Callable[[int, str, int], bool]
"""(step, term, shard) → whether the term is absent there."""

MADE: Mapping[str, Callable[[], LossExecutor]] = {
    "switch_on × gradnorm": lambda: LossExecutor(
        WEIGHTS, base="a", weighting=SwitchOn(3, "c", at=2, ramp=3, share=0.4) * GradNorm(3)
    ),
    "wind_down by cosines": lambda: LossExecutor(WEIGHTS, base="a", weighting=WindDown(3, "b", opposed=1)),
}
"""Rules that take gradients only where they are asked to."""


class Net(nn.Module):
    """A trunk and three heads; what the trunk gives stays within reach for a tap."""

    features: Tensor

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.trunk = nn.Sequential(nn.Linear(4, 8), nn.Tanh())
            self.heads = nn.ModuleList(nn.Linear(8, 1) for _ in WEIGHTS)
        self.double()

    def forward(self, x: Tensor) -> list[Tensor]:
        self.features = self.trunk(x)
        return [head(self.features) for head in self.heads]

    def tap(self, where: str) -> list[Tensor]:
        """The tensors to take gradients at."""
        places = {"features": [self.features], "parameter": [self.trunk[0].weight]}
        return places.get(where) or [tensor for place in places.values() for tensor in place]


@dataclass
class Trace:
    """What a run left behind: the weights of every step, what became of it, and the model."""

    net: Net
    executor: LossExecutor
    weights: list[list[float]] = field(default_factory=list)
    outcomes: list[tuple[bool, str | None, str | None]] = field(default_factory=list)

    @cached_property
    def parameters(self) -> Tensor:
        """The model's and the rule's in one vector; to put it together takes all ranks."""
        everything = [*self.net.parameters(), *self.executor.parameters()]
        parts = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in everything]  # type: ignore[operator]
        return torch.cat([part.detach().double().flatten() for part in parts])

    @cached_property
    def digest(self) -> str:
        """Of the weights of every step and the last parameters, to the last bit."""
        return digest([torch.tensor(self.weights, dtype=torch.float64), self.parameters])


def digest(tensors: Iterable[Tensor]) -> str:
    """Equal where the tensors are equal to the last bit."""
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()


def batch(step: int) -> Tensor:
    """What all ranks together see in a step."""
    return torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(step)).double()


def losses_of(outs: Sequence[Tensor], x: Tensor) -> dict[str, Tensor]:
    """Three losses that differ in scale and pull apart."""
    goal = x.sum(1, keepdim=True)
    return {
        name: (out - (1 - i) * goal - i).square().mean() * 3.0**i
        for i, (name, out) in enumerate(zip(WEIGHTS, outs, strict=True))
    }


def whole_losses(outs: Sequence[Tensor], x: Tensor, step: int, absent: Absent, size: int) -> dict[str, Tensor]:
    """What one process sees of the same batch: each term's mean over the shards that have it.

    Its gradient is the mean over all shards, as DDP makes it: one that lacks the term adds 0.
    """
    rows = x.chunk(size)
    shards = [losses_of(part, rows[i]) for i, part in enumerate(zip(*(out.chunk(size) for out in outs), strict=True))]
    found = {}
    for name in WEIGHTS:
        there = [shard[name] for i, shard in enumerate(shards) if not absent(step, name, i)]
        if there:
            value = torch.stack(there).mean()
            found[name] = value.detach() + (value - value.detach()) * (len(there) / size)
    return found


def never(step: int, name: str, shard: int) -> bool:
    """Every term is there."""
    return False


def together_absent(step: int, name: str, shard: int) -> bool:
    """Term b is absent everywhere every fourth step."""
    return name == "b" and step % 4 == 3


def now_and_then(step: int, name: str, shard: int) -> bool:
    """Also, term c is absent on the first shard alone two steps later."""
    return together_absent(step, name, shard) or (name == "c" and step % 4 == 1 and shard == 0)


def optimizer_of(net: nn.Module, executor: LossExecutor, rate: float = 1e-3) -> torch.optim.Optimizer:
    """Adam; the rule's parameters in a group of their own, as sharded ones cannot share one with others."""
    groups = [{"params": list(net.parameters())}, {"params": list(executor.parameters())}]
    return torch.optim.Adam([group for group in groups if group["params"]], lr=rate)


def wrapped(net: Net, how: str) -> nn.Module:
    """The model as DDP or ``fully_shard`` makes it."""
    if how == "ddp":
        return DistributedDataParallel(net, find_unused_parameters=True)
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    for part in (net.trunk, *net.heads):
        fully_shard(part, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def together(
    executor: LossExecutor, steps: int, *, tap: str, absent: Absent = never, wrap: str = "ddp", net: Net | None = None
) -> Trace:
    """Train on this rank's shards."""
    rank, size = dist.get_rank(), dist.get_world_size()
    trace = Trace(net or Net(), executor)
    module, optimizer = wrapped(trace.net, wrap), optimizer_of(trace.net, executor)
    for step in range(steps):
        x = batch(step).chunk(size)[rank]
        optimizer.zero_grad()
        losses = {n: loss for n, loss in losses_of(module(x), x).items() if not absent(step, n, rank)}
        take_step(trace, optimizer, losses, tap, step, rank)
    return trace


def alone(
    executor: LossExecutor, steps: int, *, tap: str, absent: Absent = never, net: Net | None = None, **_: Any
) -> Trace:
    """Train on whole batches, without a word to the other ranks."""
    executor.parallel, size = False, dist.get_world_size()
    trace = Trace(net or Net(), executor)
    optimizer = optimizer_of(trace.net, executor)
    for step in range(steps):
        x = batch(step)
        optimizer.zero_grad()
        losses = whole_losses(trace.net(x), x, step, absent, size)
        take_step(trace, optimizer, losses, tap, step, (size - 1) / 2)
    return trace


def take_step(
    trace: Trace, optimizer: torch.optim.Optimizer, losses: dict[str, Tensor], tap: str, step: int, rank: float
) -> None:
    """One step and its record; every third ends an epoch, whose metric differs by ranks, around the same mean."""
    executor = trace.executor
    executor(losses, tap=trace.net.tap(tap)).backward()
    record = executor.step(optimizer)
    trace.weights.append(list(executor.weights.values()))
    trace.outcomes.append((record.applied, record.reason, record.term))
    if step % 3 == 2:
        executor.end_epoch(select_loss=(1.0 + rank) / (step + 1))


def compared(ours: Trace, make: Callable[[], Trace]) -> dict[str, Any]:
    """How far a run together and, on the first rank, one alone are apart, in weights and parameters."""
    found: dict[str, Any] = {"digest": ours.digest, "applied": sum(applied for applied, *_ in ours.outcomes)}
    if dist.get_rank() == 0:
        theirs = make()
        weights = [torch.tensor(trace.weights, dtype=torch.float64) for trace in (ours, theirs)]
        found["weights"] = float(((weights[0] - weights[1]).abs() / weights[1].abs().clamp_min(1)).max())
        found["parameters"] = float((ours.parameters - theirs.parameters).abs().max())
    return found


def rules(cases: Sequence[tuple[str, str]], steps: int, wrap: str = "ddp") -> dict[str, dict[str, Any]]:
    """Every (rule, tap), terms absent now and then; or what refuses it."""
    warnings.simplefilter("ignore")
    found, absent = {}, now_and_then if wrap == "ddp" else together_absent
    for name, tap in cases:
        make = MADE.get(name, lambda name=name: executor_for(name, WEIGHTS))
        try:
            ours = together(make(), steps, tap=tap, absent=absent, wrap=wrap)
        except ValueError as error:
            found[f"{name} at {tap}"] = {"refused": str(error)}
            continue
        found[f"{name} at {tap}"] = compared(
            ours, lambda make=make, tap=tap: alone(make(), steps, tap=tap, absent=absent)
        )
    return found
