"""Where two states differ, to the last bit."""

from __future__ import annotations

from typing import Any

import torch


def differences(one: Any, two: Any, path: str = "") -> list[str]:
    """The places at which two nested states are not the same bits; NaN is like itself, −0 is not like 0."""
    if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
        same = one.dtype == two.dtype and one.shape == two.shape and _bytes(one) == _bytes(two)
        return [] if same else [path]
    if isinstance(one, dict) and isinstance(two, dict):
        if one.keys() != two.keys():
            return [f"{path}: {sorted(map(str, one.keys() ^ two.keys()))}"]
        return [place for key in one for place in differences(one[key], two[key], f"{path}/{key}")]
    if isinstance(one, (list, tuple)) and type(one) is type(two):
        if len(one) != len(two):
            return [f"{path}: {len(one)} and {len(two)} items"]
        pairs = enumerate(zip(one, two, strict=True))
        return [place for i, (a, b) in pairs for place in differences(a, b, f"{path}/{i}")]
    return [] if type(one) is type(two) and repr(one) == repr(two) else [f"{path}: {one!r} and {two!r}"]


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
