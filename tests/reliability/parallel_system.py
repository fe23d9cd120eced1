"""Between ranks: the whole system, resume, accumulation, users who step themselves, and the setting."""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from adaptive_loss import LossExecutor, LossMonitor, MetaController, bucket_means
from adaptive_loss.meta_controller import RULE
from adaptive_loss.probes import held_out
from tests.reliability.parallel_jobs import (
    WEIGHTS,
    Net,
    Trace,
    alone,
    batch,
    compared,
    digest,
    losses_of,
    optimizer_of,
    take_step,
    together,
    whole_losses,
    wrapped,
)

CUT = 22
"""A step with a look-ahead: the first after a restart makes it before it knows the optimizer."""


def system_for(net: Net, rank: int, size: int, rule: str = "fixed") -> LossExecutor:
    """Controller and monitor, with a probe on this rank's part of the held-out data."""
    data = torch.randn(16, 4, generator=torch.Generator().manual_seed(99)).double().chunk(size)[rank]

    def objective(x: Tensor) -> Tensor:
        return sum(losses_of(net(x), x).values(), torch.zeros(()))

    probe = held_out(objective, data, batch_size=len(data), model=net)
    return LossExecutor(WEIGHTS, base="a", weighting=rule, modulators=(MetaController(RULE), LossMonitor()), probe=probe)


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


def system(steps: int, rules: list[str], wrap: str = "ddp") -> dict[str, dict[str, Any]]:
    """Whole and in one process, over several base rules."""
    warnings.simplefilter("ignore")
    found = {}
    for rule in rules:
        net = Net()
        ours = together(
            system_for(net, dist.get_rank(), dist.get_world_size(), rule), steps, tap="features", wrap=wrap, net=net
        )

        def by_itself(rule: str = rule) -> Trace:
            other = Net()
            return alone(system_for(other, 0, 1, rule), steps, tap="features", net=other)

        monitor = ours.executor.modulators[1]
        assert isinstance(monitor, LossMonitor)
        found[rule] = compared(ours, by_itself) | {
            "state": state_digest(ours.executor),
            "look-aheads": ours.executor.signals.look_aheads,
            "moved": float(ours.executor.modulators[0].gains().abs().max()),
            "transitions": monitor.statistics()["transitions"],
        }
    return found


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
    rank, size, parts = dist.get_rank(), dist.get_world_size(), 2

    def run(shard: int | None) -> Trace:
        trace = Trace(Net(), LossExecutor(WEIGHTS, weighting=rule, parallel=shard is not None))
        module = trace.net if shard is None else wrapped(trace.net, "ddp")
        optimizer = optimizer_of(trace.net, trace.executor)
        for step in range(6):
            optimizer.zero_grad()
            for part in range(parts):
                x = batch(parts * step + part)
                x = x if shard is None else x.chunk(size)[shard]
                quiet = shard is not None and part < parts - 1
                with module.no_sync() if quiet else contextlib.nullcontext():  # type: ignore[operator]
                    outs = module(x)
                    losses = whole_losses(outs, x, step, lambda *_: False, size) if shard is None else losses_of(outs, x)
                    (trace.executor(losses, tap=trace.net.tap("features")) / parts).backward()
            trace.executor.step(optimizer)
            trace.weights.append(list(trace.executor.weights.values()))
        return trace

    return compared(run(rank), lambda: run(None))


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


def own_steps() -> dict[str, Any]:
    """The user steps the optimizer himself; the rule learns, and one batch is bad on one rank."""
    trace = Trace(Net(), LossExecutor(WEIGHTS, weighting="uncertainty"))
    module, optimizer = wrapped(trace.net, "ddp"), optimizer_of(trace.net, trace.executor)
    for step in range(6):
        x = batch(step).chunk(dist.get_world_size())[dist.get_rank()]
        optimizer.zero_grad()
        losses = losses_of(module(x), x)
        losses["b"] = losses["b"] * (math.nan if step == 3 and dist.get_rank() == 0 else 1.0)
        trace.executor(losses).backward()
        optimizer.step()
        trace.weights.append(list(trace.executor.weights.values()))
    return {"digest": trace.digest, "steps": trace.executor.signals.step, "skipped": trace.executor.skipped_steps}


def shadow() -> bool:
    """In shadow mode training is bit for bit as without the executor, though terms are bad on one rank."""

    def run(look: bool) -> Tensor:
        trace = Trace(Net(), LossExecutor(WEIGHTS, weighting="dwa", apply=False))
        module, optimizer = wrapped(trace.net, "ddp"), optimizer_of(trace.net, trace.executor)
        for step in range(5):
            x = batch(step).chunk(dist.get_world_size())[dist.get_rank()]
            optimizer.zero_grad()
            losses = losses_of(module(x), x)
            losses["a"] = losses["a"] * (1e9 if step == 3 and dist.get_rank() == 0 else 1.0)
            plain = losses["a"] * 1.0 + losses["b"] * 0.5 + losses["c"] * 2.0
            (trace.executor(losses) if look else plain).backward()
            trace.executor.step(optimizer) if look else optimizer.step()
        return trace.parameters

    return torch.equal(run(True), run(False))


def buckets() -> dict[str, Any]:
    """Per-sample losses by bucket, some of them empty on one rank; weights as one process finds from their means."""
    rank, size = dist.get_rank(), dist.get_world_size()
    index = torch.arange(8) % (3 if rank == 0 else 5)  # buckets 3 and 4 are empty on the first rank
    names = {f"level {i}": 1.0 for i in range(5)}
    p = nn.Parameter(torch.ones(8, dtype=torch.float64))
    executor = LossExecutor(names, weighting="inverse_ema")
    other = LossExecutor(names, weighting="inverse_ema", parallel=False)
    optimizer, worst, weights = torch.optim.SGD([p], lr=0.0), 0.0, []
    for step in range(4):
        found = bucket_means((p + step) * (1.0 + torch.arange(8) + rank), index, 5)
        executor(found).backward()
        executor.step(optimizer)
        weights.append(torch.tensor(list(executor.weights.values())))
        sums = torch.stack([found.means.detach() * found.present, found.present.double()])
        dist.all_reduce(sums)
        live = [(sums[0, i] / sums[1, i]).clone().requires_grad_() for i in range(5)]
        other(dict(zip(names, live, strict=True))).backward()
        other.step(optimizer)
        worst = max(worst, *(abs(executor.weights[n] - other.weights[n]) for n in names))
    return {"digest": digest(weights), "worst": worst, "size": size}


def refusals() -> dict[str, str]:
    """What is refused when ranks are not alike: the same on all of them."""
    rank = dist.get_rank()
    makers: dict[str, Callable[[], LossExecutor]] = {
        "seeds": lambda: LossExecutor(WEIGHTS, weighting="rlw", seed=rank),
        "start weights": lambda: LossExecutor({"a": 1.0, "b": 1.0 + rank, "c": 1.0}),
    }
    return {name: _message(make()) for name, make in makers.items()}


def _message(executor: LossExecutor) -> str:
    p = nn.Parameter(torch.ones(()))
    try:
        executor(dict.fromkeys(WEIGHTS, p * 1.0)).backward()
    except ValueError as error:
        return str(error)
    return ""


def settings() -> dict[str, Any]:
    """Off, each rank keeps its own weights and may train alone; a group of one is no group."""
    rank, size = dist.get_rank(), dist.get_world_size()
    groups = [dist.new_group([i]) for i in range(size)]
    steps, found = {"off": 1 + rank, "a group of its own": 2 + rank}, {}
    for name, parallel in {"off": False, "a group of its own": groups[rank]}.items():
        executor = LossExecutor({"a": 1.0, "b": 1.0}, weighting="inverse_ema", parallel=parallel)
        p = nn.Parameter(torch.ones(()))
        optimizer = torch.optim.SGD([p], lr=0.0)
        for _ in range(steps[name]):  # as many as it likes: the ranks do not wait for each other
            executor({"a": p * (1.0 + rank), "b": p}).backward()
            executor.step(optimizer)
        found[name] = executor.weights["a"] / executor.weights["b"]
    with torch.no_grad():  # evaluation asks nobody
        found["evaluated"] = [float(LossExecutor({"a": 2.0})({"a": p})) for _ in range(rank)]
    return found


def everything() -> dict[str, Any]:
    """All of the small ones in one go."""
    warnings.simplefilter("ignore")
    return {
        "restart": restart(),
        "accumulated": {rule: accumulated(rule) for rule in ("gradnorm", "uncertainty", "softadapt")},
        "synchronisations": synchronisations(),
        "own steps": own_steps(),
        "shadow": shadow(),
        "buckets": buckets(),
        "refusals": refusals(),
        "settings": settings(),
    }
