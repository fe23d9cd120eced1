"""TorchJD's objects: made, copied, and their state read and written from outside, as their own leaves much out."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from adaptive_loss.errors import UsageError

INSTALL = "run: pip install 'adaptive-loss[torchjd]'"
_OPTIONS: dict[str, dict[str, Any]] = {"CAGrad": {"c": 0.5}, "FairGrad": {"alpha": 1.0}, "STCH": {"mu": 1.0}}
"""What TorchJD leaves to its user: the values of the authors' code."""
_KEPT = 64
"""Sets of present terms whose state is kept, the last ones used."""

State = dict[str, Any]
"""Path of an attribute → its value, for those that differ from a fresh object's; loads with ``weights_only=True``."""

_MODULE = frozenset(vars(nn.Module()))
_REBUILT = frozenset({"step"})
"""NashMTL makes its problem at its step 0, and a problem cannot be saved: it is made anew at every call."""


def make(method: str, kind: type[nn.Module], n_terms: int, options: Mapping[str, Any]) -> nn.Module:
    """An object of TorchJD's class ``kind`` for K terms.

    Raises:
        UsageError: its own packages are not installed, or it wants other options.
    """
    wanted = inspect.signature(kind).parameters
    given = {**_OPTIONS.get(method, {}), **options}
    given |= {size: n_terms for size in ("n_tasks", "shape") if size in wanted}
    try:
        return kind(**given)
    except ImportError as error:
        raise UsageError(f"weighting 'torchjd:{method}' needs packages that are not installed; {INSTALL}") from error
    except TypeError as error:
        names = ", ".join(name for name in wanted if name not in ("n_tasks", "shape"))
        raise UsageError(
            f"weighting 'torchjd:{method}' takes options {names or 'none'} ({error}); "
            f"make it with torchjd_rule({n_terms}, {method!r}, ...) of adaptive_loss.weighting.torchjd"
        ) from error


def fresh_copy(template: nn.Module, rows: Sequence[int], n_terms: int) -> nn.Module:
    """A copy of ``template`` for the terms ``rows`` of K: its vectors of length K are cut down to them."""
    made = copy.deepcopy(template)
    part: Any
    for part in made.modules():
        for name, value in vars(part).items():
            if isinstance(value, Tensor) and value.shape == (n_terms,):
                vars(part)[name] = value[list(rows)]
        if hasattr(part, "n_tasks"):
            part.n_tasks = len(rows)
            part.reset()
    return made


def read_state(fresh: nn.Module, used: nn.Module) -> State:
    """What calling ``used`` has changed against ``fresh``."""
    before = _plain(fresh)
    return {path: _saved(value) for path, value in _plain(used).items() if not _same(before.get(path), value)}


def write_state(fresh: nn.Module, state: State) -> None:
    """Continue from :func:`read_state`, with copies: TorchJD writes into its tensors."""
    parts = dict(fresh.named_modules())
    for path, value in state.items():
        owner, _, name = path.rpartition(".")
        part = parts[owner]
        loaded = copy.deepcopy(value)
        if isinstance(getattr(part, name, None), np.ndarray):
            loaded = loaded.numpy()
        setattr(part, name, loaded)


def key_of(rows: Sequence[int]) -> str:
    """The set of terms as a state's key."""
    return ",".join(map(str, rows))


def with_state(states: Mapping[str, State], rows: Sequence[int], state: State) -> dict[str, State]:
    """The states with this one added, or without it where there is nothing to keep; the oldest goes."""
    kept = {key: value for key, value in states.items() if key != key_of(rows)}
    if state:
        kept[key_of(rows)] = state
    return dict(list(kept.items())[-_KEPT:])


@contextlib.contextmanager
def own_dice(seed: int, draws: int) -> Iterator[None]:
    """Draw from a seed of ours and leave the global generator, which TorchJD draws from, as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed((seed * 1_000_003 + draws) % 2**63)
        yield


def _plain(module: nn.Module) -> dict[str, Any]:
    """Path → value of all buffers, numbers, tensors and lists of them."""
    found = {}
    for path, part in module.named_modules():
        own = {name: value for name, value in vars(part).items() if name not in _MODULE | _REBUILT}
        for name, value in {**own, **part._buffers}.items():
            if _is_plain(value):
                found[f"{path}.{name}"] = value
    return found


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(item) for item in value)
    kinds = (bool, int, float, str, Tensor, np.ndarray, torch.dtype, torch.device)
    return value is None or isinstance(value, kinds)


def _saved(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    return value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return a.shape == b.shape and bool((a == b).all())
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and not isinstance(a, (Tensor, np.ndarray)) and a == b
