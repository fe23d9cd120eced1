"""Between ranks: controller and monitor, a restart, accumulated batches, and how often gradients are sent."""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from adaptive_loss import LossExecutor, LossMonitor, MetaController
from adaptive_loss.meta_controller import RULE
from adaptive_loss.probes import held_out
from tests.reliability.parallel_jobs import (
    WEIGHTS,
    Net,
    Trace,
    alone,
    batch,
    compared,
    losses_of,
    optimizer_of,
    take_step,
    together,
    wrapped,
)

CUT = 22
"""A step with a look-ahead: the first after a restart makes it before it knows the optimizer."""


def system_for(net: Net, rank: int, size: int, rule: str = "fixed", base: str | None = "a") -> LossExecutor:
    """Controller and monitor, with a probe on this rank's part of the held-out data."""
    data = torch.randn(16, 4, generator=torch.Generator().manual_seed(99)).double().chunk(size)[rank]

    def objective(x: Tensor) -> Tensor:
        return sum(losses_of(net(x), x).values(), torch.zeros(()))

    probe = held_out(objective, data, batch_size=len(data), model=net)
    modulators = (MetaController(RULE), LossMonitor())
    return LossExecutor(WEIGHTS, base=base, weighting=rule, modulators=modulators, probe=probe)


def state_digest(executor: LossExecutor) -> str:
    """Of all that the executor would save, but for where the probe stands."""
    state = executor.state_dict()
    state["_extra_state"] = state["_extra_state"] | {"probe": None}
    return hashlib.sha256(repr(_plain(state)).encode()).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return str(value.dtype), value.tolist()
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value


def system(steps: int, rules: Sequence[str], base: str | None = "a", wrap: str = "ddp") -> dict[str, dict[str, Any]]:
    """Controller and monitor over several rules, on this rank's shards and, on the first rank, in one process."""
    warnings.simplefilter("ignore")
    return {rule: system_run(steps, rule, base, wrap) for rule in rules}


def system_run(steps: int, rule: str, base: str | None, wrap: str) -> dict[str, Any]:
    net = Net()
    executor = system_for(net, dist.get_rank(), dist.get_world_size(), rule, base)
    ours = together(executor, steps, tap="features", wrap=wrap, net=net)

    def by_itself() -> Trace:
        other = Net()
        theirs = system_for(other, 0, 1, rule, base)
        theirs._can_look = wrap == "ddp"
        return alone(theirs, steps, tap="features", net=other)

    monitor = executor.modulators[1]
    assert isinstance(monitor, LossMonitor)
    return compared(ours, by_itself) | {
        "state": state_digest(executor),
        "look-aheads": executor.signals.look_aheads,
        "moved": float(executor.modulators[0].gains().abs().max()),
        "transitions": monitor.statistics()["transitions"],
        "told": sorted(executor._told),
    }


def restart() -> dict[str, Any]:
    """Cut at a step with a look-ahead, saved, loaded and gone on: as if nothing had been."""
    rank, size = dist.get_rank(), dist.get_world_size()
    net = Net()
    trace, file = Trace(net, system_for(net, rank, size)), io.BytesIO()
    optimizer = optimizer_of(net, trace.executor)
    module = wrapped(net, "ddp")
    _go_on(trace, module, optimizer, range(CUT))
    torch.save([net.state_dict(), optimizer.state_dict(), trace.executor.state_dict()], file)
    _go_on(trace, module, optimizer, range(CUT, CUT + 12))
    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    other = Net()
    again = Trace(other, system_for(other, rank, size))
    second = optimizer_of(other, again.executor)
    for part, state in zip((other, second, again.executor), saved, strict=True):
        part.load_state_dict(state)
    looks = again.executor.signals.look_aheads
    _go_on(again, wrapped(other, "ddp"), second, range(CUT, CUT + 12))
    return {
        "same": again.weights == trace.weights[CUT:] and torch.equal(again.parameters, trace.parameters),
        "looked": again.executor.signals.look_aheads > looks,
        "state": state_digest(again.executor) == state_digest(trace.executor),
    }


def _go_on(trace: Trace, module: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    for step in steps:
        x = batch(step).chunk(size)[rank]
        optimizer.zero_grad()
        take_step(trace, optimizer, losses_of(module(x), x), "features", step, rank)


def accumulated(rule: str) -> dict[str, Any]:
    """Two batches a step, the first without synchronisation, against one process that accumulates the same."""
    ours = Trace(Net(), LossExecutor(WEIGHTS, weighting=rule))
    _accumulate(ours, wrapped(ours.net, "ddp"), lambda x: x.chunk(dist.get_world_size())[dist.get_rank()])

    def by_itself() -> Trace:
        theirs = Trace(Net(), LossExecutor(WEIGHTS, weighting=rule, parallel=False))
        _accumulate(theirs, theirs.net, lambda x: x)
        return theirs

    return compared(ours, by_itself)


def _accumulate(trace: Trace, module: nn.Module, mine: Callable[[Tensor], Tensor], parts: int = 2) -> None:
    optimizer = optimizer_of(trace.net, trace.executor)
    for step in range(6):
        optimizer.zero_grad()
        for part in range(parts):
            x = mine(batch(parts * step + part))
            quiet = part < parts - 1 and isinstance(module, DistributedDataParallel)
            with module.no_sync() if quiet else contextlib.nullcontext():  # type: ignore[operator]
                losses = losses_of(module(x), x)
                (trace.executor(losses, tap=trace.net.tap("features")) / parts).backward()
        trace.executor.step(optimizer)
        trace.weights.append(list(trace.executor.weights.values()))


def synchronisations() -> dict[str, list[int]]:
    """How often DDP's reducer sends its one bucket in each step: gradients at parameters and look-aheads included."""
    counts: list[int] = []

    def counted(state, bucket):  # type: ignore[no-untyped-def]  # DDP refuses annotations that are postponed
        counts[-1] += 1
        return allreduce_hook(dist.group.WORLD, bucket)

    net = Net()
    executor = system_for(net, dist.get_rank(), dist.get_world_size(), "gradnorm")
    module, optimizer = DistributedDataParallel(net), optimizer_of(net, executor)
    module.register_comm_hook(None, counted)
    for step in range(6):
        counts.append(0)
        x = batch(step).chunk(dist.get_world_size())[dist.get_rank()]
        optimizer.zero_grad()
        losses = losses_of(module(x), x)
        if step == 4:
            losses["a"] = losses["a"] * math.nan
        executor(losses, tap=net.tap("parameter")).backward()
        executor.step(optimizer)
    return {"buckets": counts, "look-aheads": [executor.signals.look_aheads]}
