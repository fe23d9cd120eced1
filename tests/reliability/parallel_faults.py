"""Faults on one rank: whatever it is, all ranks must do the same, and go on."""

from __future__ import annotations

import contextlib
import math
import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from adaptive_loss import Guards, LossExecutor
from adaptive_loss.rollback import Rollback
from adaptive_loss.weighting.base import Context, Weighting, ones
from tests.reliability.parallel_jobs import WEIGHTS, Net, Trace, batch, losses_of, optimizer_of, wrapped

LOSSES = {"nan": math.nan, "inf": math.inf, "minus inf": -math.inf, "spike": 1e6}
"""What the victim's loss is multiplied by."""
KINDS = (*LOSSES, "weights", "gradient", "own gradient", "overflow")
STEPS = 12


class Poisoned(Weighting):
    """Weights of 1, or NaN for term b while ``bad``."""

    bad = False

    def forward(self, losses: Tensor, context: Context) -> Tensor:
        weights = ones(self.n_terms)
        weights[1] = math.nan if self.bad else 1.0
        return weights


@dataclass(frozen=True)
class Fault:
    """What goes wrong on one rank.

    Args:
        kind: one of :data:`KINDS`.
        rank, step, part: where and when; ``part`` counts the accumulated batches.
        parts: accumulated batches a step.
    """

    kind: str
    rank: int
    step: int
    part: int
    parts: int

    @classmethod
    def drawn(cls, trial: int, size: int, kinds: Sequence[str], most_parts: int) -> Fault:
        """The same on every rank."""
        dice = random.Random(trial)
        parts = dice.randint(1, most_parts)
        kind = kinds[trial % len(kinds)]
        return cls(kind, dice.randrange(size), dice.randrange(9, STEPS - 1), dice.randrange(parts), parts)


def faults(trials: Sequence[int], wrap: str = "ddp", kinds: Sequence[str] = KINDS) -> list[dict[str, Any]]:
    """One fault a trial."""
    warnings.simplefilter("ignore")
    most = 2 if wrap == "ddp" else 1
    return [_trial(Fault.drawn(trial, dist.get_world_size(), kinds, most), wrap) for trial in trials]


def _trial(fault: Fault, wrap: str) -> dict[str, Any]:
    rule = Poisoned(3)
    executor = LossExecutor(WEIGHTS, weighting=rule, guards=Guards(spike_window=16))
    trace = Trace(Net(), executor)
    module, optimizer = wrapped(trace.net, wrap), optimizer_of(trace.net, executor)
    scaler = torch.amp.GradScaler("cpu", enabled=fault.kind == "overflow", growth_interval=1000)
    kept = True
    for step in range(STEPS):
        mine = fault.step == step and fault.rank == dist.get_rank()
        before = [_local(p).clone() for p in trace.net.parameters()]
        optimizer.zero_grad()
        for part in range(fault.parts):
            kind = fault.kind if mine and part == fault.part else ""
            last = part == fault.parts - 1
            with contextlib.nullcontext() if last else module.no_sync():  # type: ignore[operator]
                _backward(trace, module, scaler, step * 2 + part, kind)
        if mine and fault.kind in ("own gradient", "overflow"):
            grad = next(trace.net.parameters()).grad
            assert grad is not None
            _local(grad).view(-1)[0] = math.nan
        record = executor.step(optimizer, scaler=scaler)
        trace.weights.append(list(executor.weights.values()))
        trace.outcomes.append((record.applied, record.reason, record.term))
        if step == fault.step:
            kept = all(torch.equal(a, _local(b)) for a, b in zip(before, trace.net.parameters(), strict=True))
    return {
        "fault": vars(fault),
        "applied": [applied for applied, *_ in trace.outcomes],
        "reason": trace.outcomes[fault.step][1],
        "term": trace.outcomes[fault.step][2],
        "kept": kept,
        "scale": scaler.get_scale(),
        "digest": trace.digest,
    }


def _backward(trace: Trace, module: nn.Module, scaler: torch.amp.GradScaler, seed: int, kind: str) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    x = batch(seed).chunk(size)[rank]
    outs = module(x)
    losses = losses_of(outs, x)
    if kind in LOSSES:
        losses["b"] = losses["b"] * LOSSES[kind]
    if kind == "gradient":
        # Where DDP hands on copies of what the model returns, it may ask for a gradient that is not there.
        outs[1].register_hook(lambda gradient: gradient if gradient is None else gradient * math.nan)
    if isinstance(trace.executor.weighting, Poisoned):
        trace.executor.weighting.bad = kind == "weights"
    scaler.scale(trace.executor(losses)).backward()


def guarded(wrap: str) -> dict[str, Any]:
    """On the first rank term b is bad for three steps on end, later its gradient is: quarantine and rollback."""
    guards = Guards(spikes=False, quarantine=2, quarantine_steps=4)
    trace = Trace(Net(), LossExecutor(WEIGHTS, base="a", guards=guards))
    module, optimizer = wrapped(trace.net, wrap), optimizer_of(trace.net, trace.executor)
    rollback = Rollback(trace.executor, optimizer, trace.net, every=2, after=3)
    off, bad, out, back = torch.amp.GradScaler(enabled=False), [], [], []
    for step in range(20):
        kind = "nan" if step in (3, 4, 5) else "gradient" if step in (14, 15, 16) else ""
        optimizer.zero_grad()
        _backward(trace, module, off, step, kind if dist.get_rank() == 0 else "")
        record = trace.executor.step(optimizer)
        trace.weights.append(list(trace.executor.weights.values()))
        bad += [] if record.applied else [[step, record.cause, record.term]]
        out += [step] if "b" in trace.executor.quarantined else []
        back += [step] if rollback.watch(record) else []
    return {"bad": bad, "out": out, "back": back, "digest": trace.digest}


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local().detach() if hasattr(tensor, "to_local") else tensor.detach()  # type: ignore[operator]


def wrong(ranks: Sequence[dict[str, Any]]) -> str | None:
    """What a trial did wrong, from what each rank tells of it; None if nothing."""
    first, fault = ranks[0], ranks[0]["fault"]
    wanted = [step != fault["step"] for step in range(STEPS)]
    if any(told["applied"] != wanted for told in ranks):
        return f"{fault}: steps applied {[told['applied'] for told in ranks]}"
    if any(told["digest"] != first["digest"] or not told["kept"] for told in ranks):
        return f"{fault}: weights or parameters differ, or the skipped step moved them"
    if any(told["scale"] != first["scale"] for told in ranks):
        return f"{fault}: the scalers differ"
    victim = ranks[fault["rank"]]
    if fault["kind"] in (*LOSSES, "weights") and victim["term"] != "b":
        return f"{fault}: {victim['term']} was blamed"
    if fault["kind"] in LOSSES and any(told["reason"] != first["reason"] for told in ranks):
        return f"{fault}: the reasons differ"
    return None
