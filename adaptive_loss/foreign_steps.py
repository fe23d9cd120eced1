"""Notices the optimizer steps that a user takes himself."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

T = TypeVar("T")

_watching: weakref.WeakKeyDictionary[Any, Callable[[Any, Optimizer], None]] = weakref.WeakKeyDictionary()


def watch_steps(owner: T, stepped: Callable[[T, Optimizer], None]) -> None:
    """Call ``stepped(owner, optimizer)`` after every step of any optimizer, for as long as ``owner`` lives.

    A parameter's version counter would not do: fused optimizers leave it as it is.
    """
    _hook_once()
    _watching[owner] = stepped


@functools.cache
def _hook_once() -> None:
    # One hook for all owners, which stays: PyTorch walks through its hooks, and one that an owner's death took away
    # meanwhile would end the user's step with an error.
    register_optimizer_step_post_hook(_tell)


def _tell(optimizer: Optimizer, *_: Any) -> None:
    for owner, stepped in list(_watching.items()):
        stepped(owner, optimizer)
