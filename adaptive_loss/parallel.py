"""Data parallel: what the ranks of a process group tell each other, so that all of them find the same weights.

Ranks are to one process what accumulated batches are: a term's loss is the mean over the ranks that have it, the
gradient is the mean over all ranks, as DDP and FSDP make it. Every function takes the group; with None, one process
alone, it does nothing and gives back what it got.
"""

from __future__ import annotations

import atexit
import math
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn

from adaptive_loss.errors import UsageError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Group: TypeAlias = "ProcessGroup | None"
"""The ranks that train one model together; None is one process alone."""

_METRICS = ("select_loss", "select_accuracy")
_PATIENCE = 5.0
"""Seconds that a process waits at its end, at most."""
_last_sent: list[Tensor] = []
"""The tensor of the last collective, if any."""


def checked(parallel: bool | ProcessGroup) -> bool | ProcessGroup:
    """The setting itself.

    Raises:
        TypeError: it is neither True nor False nor a process group.
    """
    # Of a group that a rank is no member of, PyTorch gives it a number.
    if not isinstance(parallel, int) and not (dist.is_available() and isinstance(parallel, dist.ProcessGroup)):
        kind = type(parallel).__name__
        raise TypeError(f"parallel is a {kind}: give True, False or a process group, such as mesh.get_group()")
    return parallel


def group_of(parallel: bool | ProcessGroup) -> Group:
    """The ranks that an executor's setting means now; None where there is one process.

    Args:
        parallel: True for all ranks, False for none but this one, or a group.
    """
    if parallel is False or not (dist.is_available() and dist.is_initialized()):
        return None
    group = dist.group.WORLD if parallel is True else parallel
    return group if dist.get_world_size(group) > 1 else None


def size_of(group: Group) -> int:
    """How many ranks there are."""
    return 1 if group is None else dist.get_world_size(group)


def summed(values: Tensor, group: Group) -> Tensor:
    """Σ over ranks, elementwise, the same bits on every rank."""
    return values if group is None else _reduced(values, dist.ReduceOp.SUM, group)


def greatest(values: Tensor, group: Group) -> Tensor:
    """The greatest over ranks, elementwise; NaN counts as ∞, for which alone no backend vouches."""
    if group is None:
        return values
    return _reduced(values.nan_to_num(math.inf, math.inf, -math.inf), dist.ReduceOp.MAX, group)


def mean_where(values: Tensor, there: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    """Means over the ranks that have a value, NaN where none has, and where some has. All [K], ``there`` is bool.

    One that is not finite anywhere is not finite on any rank, so that all reject the same step.
    """
    if group is None:
        return values, there
    sums = summed(torch.cat([torch.where(there, values, 0.0), there.to(values.dtype)]), group)
    total, count = sums.chunk(2)
    return total / count, count > 0


def mean(value: float, group: Group) -> float:
    """The mean over all ranks of a number."""
    if group is None:
        return value
    return float(summed(torch.tensor([value], dtype=torch.float64), group)) / size_of(group)


def worst_norm(norm: float, group: Group) -> float:
    """The greatest norm over ranks; ∞ where it is not finite on some, so that all skip the same step."""
    return norm if group is None else float(greatest(torch.tensor([norm], dtype=torch.float64), group))


def mean_metrics(metrics: Mapping[str, float], group: Group) -> dict[str, float]:
    """``select_loss`` and ``select_accuracy`` as means over the ranks that give them; the others as they are."""
    if group is None:
        return dict(metrics)
    values = torch.tensor([metrics.get(name, math.nan) for name in _METRICS], dtype=torch.float64)
    means, known = mean_where(values, torch.tensor([name in metrics for name in _METRICS]), group)
    told = zip(_METRICS, means.tolist(), known.tolist(), strict=True)
    return {**metrics, **{name: value for name, value, is_known in told if is_known}}


def all_accept(weights: Tensor | None, n_terms: int, group: Group) -> bool:
    """Whether every rank has weights, and none a reason to reject the step.

    Args:
        weights: [K] this rank's; None where it rejects the step.
        n_terms: K.

    Raises:
        UsageError: on every rank, where their weights are not the same to the last bit.
    """
    if group is None:
        return weights is not None
    sent = torch.full((n_terms,), math.inf, dtype=torch.float64) if weights is None else weights
    top, bottom = greatest(torch.cat([sent, sent if weights is None else -sent]), group).chunk(2)
    if torch.isinf(top).any():
        return False
    if not torch.equal(top, -bottom):
        raise UsageError(
            "the ranks found different weights: make the executor alike on all of them, seed included, load the same "
            "state, and tell its rule the same; parallel=False keeps each rank's weights its own"
        )
    return True


def first_decides(choice: int, group: Group) -> int:
    """The choice of the group's first rank."""
    if group is None:
        return choice
    told = _noted(torch.tensor([choice], device=_device(torch.device("cpu"), group)))
    dist.broadcast(told, group_src=0, group=group)
    return int(told)


def share_overflow(scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer, group: Group) -> None:
    """Tell every rank's scaler of an overflow on any, between ``unscale_`` and ``step``, as FSDP 1's scaler does."""
    if group is not None:
        for found in scaler._found_inf_per_device(optimizer).values():
            found.copy_(greatest(found, group))


def is_whole(tensor: Tensor) -> bool:
    """Whether every rank has all of the tensor: a parameter. Any other is a rank's own part of the batch."""
    return isinstance(tensor, nn.Parameter)


def is_split(tensor: Tensor) -> bool:
    """Whether the ranks have a part each of this parameter or its gradient, as ``fully_shard`` makes them."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def mean_gradients(
    gradients: Sequence[Sequence[Tensor | None]], at: Sequence[Tensor], whole: Sequence[bool], group: Group
) -> list[Sequence[Tensor | None]]:
    """Gradients of the losses' means over all ranks, from each rank's own; a loss that it lacks has none.

    Args:
        gradients: one a loss, each with one tensor or None for every tensor of ``at``.
        at: the tensors they were taken at.
        whole: whether every rank has all of that tensor. At one of which it has a part it gets that part's gradient.

    Returns:
        As ``gradients``; None where it is so on every rank.
    """
    if group is None:
        return list(gradients)
    there = torch.tensor([[part is not None for part in parts] for parts in gradients], dtype=torch.float64)
    known = summed(there, group).gt(0).tolist()
    return [_mean_gradient(parts, at, whole, row, group) for parts, row in zip(gradients, known, strict=True)]


def _mean_gradient(
    parts: Sequence[Tensor | None], at: Sequence[Tensor], whole: Sequence[bool], known: Sequence[bool], group: Group
) -> list[Tensor | None]:
    """One loss's mean gradient; what every rank has all of goes over the wire in one piece."""
    filled = [
        (torch.zeros_like(tensor) if part is None else part) if is_known else None
        for part, tensor, is_known in zip(parts, at, known, strict=True)
    ]
    sent = [part for part, is_whole in zip(filled, whole, strict=True) if part is not None and is_whole]
    sums = iter(_summed_in_one(sent, group))
    size = size_of(group)
    return [
        None if part is None else (next(sums) if is_whole else part) / size
        for part, is_whole in zip(filled, whole, strict=True)
    ]


def _summed_in_one(tensors: Sequence[Tensor], group: Group) -> list[Tensor]:
    """Σ over ranks of several tensors, in float32 at least: half precision would lose more than it need."""
    if not tensors:
        return []
    home = tensors[0].device
    rows = [t.reshape(-1).to(home, torch.promote_types(t.dtype, torch.float32)) for t in tensors]
    sums = summed(torch.cat(rows), group).split([len(row) for row in rows])
    return [part.view(t.shape).to(t.device) for part, t in zip(sums, tensors, strict=True)]


def _reduced(values: Tensor, how: dist.ReduceOp.RedOpType, group: Group) -> Tensor:
    sent = _noted(values.to(_device(values.device, group), copy=True))
    dist.all_reduce(sent, how, group=group)
    return sent.to(values.device)


def _noted(sent: Tensor) -> Tensor:
    _last_sent[:] = [sent]
    return sent


@atexit.register
def _wait_for_the_sender() -> None:
    """Let gloo's thread let go of what was sent last, some seconds at most, before the interpreter ends.

    It does so some time after the collective has returned, and takes the interpreter's lock for it. A thread that asks
    for that lock while the interpreter ends is ended itself, and PyTorch then aborts the process, whose work was done.
    """
    deadline = time.monotonic() + _PATIENCE
    while any(_uses(sent) > 1 for sent in _last_sent) and time.monotonic() < deadline:
        time.sleep(0.001)


def _uses(tensor: Tensor) -> int:
    """How many hold it on the side of C++; Python is one of them."""
    return tensor._use_count()  # pyright: ignore[reportAttributeAccessIssue]


def _device(wanted: torch.device, group: Group) -> torch.device:
    """``wanted``, or where the group cannot send from there (NCCL knows no host) the current one of its own kind."""
    kinds = [pair.partition(":")[0] for pair in dist.get_backend_config(group).split(",")]
    return wanted if wanted.type in kinds else torch.device(kinds[0])
