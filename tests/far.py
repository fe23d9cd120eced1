"""Tensors that claim to lie on another device, and a dispatch mode that counts what comes back to the host.

Every transfer of an accelerator's result stops the host until the device has caught up. There is no accelerator here,
so ``Far`` holds an ordinary tensor and says that it is somewhere else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

ELSEWHERE = "meta"


class Far(Tensor):
    """A tensor whose values are ``near``, and whose device is another one."""

    near: Tensor

    @staticmethod
    def __new__(cls, near: Tensor) -> Far:
        made = Tensor._make_wrapper_subclass(cls, near.shape, strides=near.stride(), dtype=near.dtype, device=ELSEWHERE)
        made.near = near
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Far({self.near})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} outside of Transfers")


class Transfers(TorchDispatchMode):
    """Computes with ``Far`` tensors and notes each operation that brings values back to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        far = any(isinstance(leaf, Far) for leaf in tree_leaves((args, kwargs)))
        to = kwargs.get("device")
        stays = far if to is None else torch.device(to).type == ELSEWHERE
        if func is torch.ops.aten._local_scalar_dense.default:
            stays = False
        if far and not stays:
            self.seen.append(str(func))
        if to is not None:
            kwargs["device"] = "cpu"
        near_args, near_kwargs = tree_map_only(Far, lambda tensor: tensor.near, (args, kwargs))
        out = func(*near_args, **near_kwargs)
        if func._schema.is_mutable and isinstance(args[0], Far):
            return args[0]
        return tree_map_only(Tensor, lambda tensor: Far(tensor) if stays else tensor, out)
