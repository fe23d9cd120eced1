"""Between ranks: users who step themselves, shadow mode, buckets, ranks that are not alike, and the setting."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import Shard, distribute_tensor

from adaptive_loss import LossExecutor, MetaController, bucket_means, parallel
from adaptive_loss.gradients import total_norm
from adaptive_loss.loss_monitor import MonitorConfig, RandomMonitor
from adaptive_loss.meta_controller import RULE
from tests.reliability.parallel_faults import KINDS, faults, guarded
from tests.reliability.parallel_jobs import (
    WEIGHTS,
    Net,
    Trace,
    batch,
    digest,
    losses_of,
    optimizer_of,
    rules,
    wrapped,
)
from tests.reliability.parallel_system import accumulated, restart, synchronisations, system_run

RULE_STEPS = 6


def own_steps(wrap: str) -> dict[str, Any]:
    """The user steps the optimizer himself; the rule learns, and one batch is bad on one rank."""
    trace = Trace(Net(), LossExecutor(WEIGHTS, weighting="uncertainty"))
    module, optimizer = wrapped(trace.net, wrap), optimizer_of(trace.net, trace.executor)
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
    for name, setting in {"off": False, "a group of its own": groups[rank]}.items():
        executor = LossExecutor({"a": 1.0, "b": 1.0}, weighting="inverse_ema", parallel=setting)
        p = nn.Parameter(torch.ones(()))
        optimizer = torch.optim.SGD([p], lr=0.0)
        for _ in range(steps[name]):  # as many as it likes: the ranks do not wait for each other
            executor({"a": p * (1.0 + rank), "b": p}).backward()
            executor.step(optimizer)
        found[name] = executor.weights["a"] / executor.weights["b"]
    with torch.no_grad():  # evaluation asks nobody
        found["evaluated"] = [float(LossExecutor({"a": 2.0})({"a": p})) for _ in range(rank)]
    return found


def decided() -> dict[str, float]:
    """Monitors that draw from dice of their own, other ones on every rank."""
    p = nn.Parameter(torch.ones(()))
    monitor = RandomMonitor(config=MonitorConfig(every=1))
    executor = LossExecutor({"a": 1.0, "b": 1.0}, modulators=[monitor], probe=lambda: p * 1.0, seed=dist.get_rank())
    optimizer = torch.optim.SGD([p], lr=0.0)
    for _ in range(12):
        executor({"a": p * 1.0, "b": p * 2.0}).backward()
        executor.step(optimizer)
    return executor.weights


class Refuses(torch.autograd.Function):
    """Passes its input on, and its gradient never."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        raise RuntimeError("no gradient here")


def lost_graph() -> dict[str, Any]:
    """A graph that one rank alone cannot keep for the look-ahead, at its second step and at the first of a restart."""
    found = {}
    for name, known in {"known": True, "not known": False}.items():
        p = nn.Parameter(torch.ones(()))
        executor = LossExecutor(
            {"a": 1.0, "b": 1.0}, base="a", modulators=[MetaController(RULE)], probe=lambda p=p: p * 2.0
        )
        optimizer = torch.optim.SGD([p], lr=0.1)
        for step in range(4):
            optimizer.zero_grad()
            term = p * 1.0
            if step == 1:  # the first that looks ahead
                executor._optimizer = executor._optimizer if known else None
                term = Refuses.apply(term) if dist.get_rank() == 0 else term
            executor({"a": p * 1.0, "b": term})
            p.grad = torch.ones(())
            executor.step(optimizer)
        found[name] = [executor.signals.look_aheads, executor.signals.step, sorted(executor._told)]
    return found


def split_norm() -> list[float]:
    """Norms of gradients of which each rank has a part, as parts of what they are of the whole."""
    mesh, found = dist.init_device_mesh("cpu", (dist.get_world_size(),)), []
    dice = torch.Generator().manual_seed(0)
    for kind in (torch.float32, torch.float64, torch.bfloat16):
        whole, beside = torch.randn(5, 3, generator=dice).to(kind), torch.randn(4, generator=dice)
        split = distribute_tensor(whole, mesh, [Shard(0)])
        found.append(total_norm([split, beside]) / total_norm([whole, beside]))
    return found


def metrics() -> dict[str, float]:
    """One that only the second rank gives, one that both give."""
    rank = dist.get_rank()
    given = {"select_accuracy": 0.5 + rank / 4, "other": float(rank)} | ({"select_loss": 3.0} if rank else {})
    return parallel.mean_metrics(given, dist.group.WORLD)


def everything(cases: Mapping[str, Sequence[tuple[str, str]]]) -> dict[str, Any]:
    """All of the small ones in one go, and :data:`RULE_STEPS` steps of the rules of ``cases``, wrap → (rule, tap)."""
    warnings.simplefilter("ignore")
    return {
        "rules": {wrap: rules(cases[wrap], RULE_STEPS, wrap) for wrap in ("ddp", "fsdp")},
        "restart": restart(),
        "accumulated": {rule: accumulated(rule) for rule in ("gradnorm", "uncertainty", "softadapt")},
        "synchronisations": synchronisations(),
        "own steps": {wrap: own_steps(wrap) for wrap in ("ddp", "fsdp")},
        "shadow": shadow(),
        "buckets": buckets(),
        "refusals": refusals(),
        "settings": settings(),
        "decided": decided(),
        "lost graph": lost_graph(),
        "metrics": metrics(),
        "guarded": {wrap: guarded(wrap) for wrap in ("ddp", "fsdp")},
        "split norm": split_norm(),
        "faults": {wrap: faults(range(len(KINDS)), wrap) for wrap in ("ddp", "fsdp")},
        "systems": {
            "with a base": system_run(25, "gradnorm", "a", "ddp"),
            "without": system_run(25, "fixed", None, "ddp"),
            "fully_shard": system_run(15, "fixed", "a", "fsdp"),
        },
    }
