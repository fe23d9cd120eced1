"""Notices the optimizer steps that a user takes himself."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, TypeVar

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

T = TypeVar("T")


def watch_steps(owner: T, stepped: Callable[[T, Optimizer], None]) -> None:
    """Call ``stepped(owner, optimizer)`` after every step of any optimizer, for as long as ``owner`` lives.

    A parameter's version counter would not do: fused optimizers leave it as it is.
    """
    reference = weakref.ref(owner)

    def hook(optimizer: Optimizer, *_: Any) -> None:
        alive = reference()
        if alive is not None:
            stepped(alive, optimizer)

    weakref.finalize(owner, register_optimizer_step_post_hook(hook).remove)
