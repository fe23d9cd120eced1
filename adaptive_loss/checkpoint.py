"""Checkpoints: everything a training run needs to go on bit for bit, written so that no kill can lose it."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import random
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from adaptive_loss.errors import RunError, UsageError
from adaptive_loss.records import json_dump, remove_leftovers, write_atomic

FORMAT = 2
"""Changes whenever files could no longer be read as they are; another format is refused. 1 had no reader."""
KEPT = 2
"""Checkpoints of an unfinished run that stay: should the newest be damaged, there is the one before."""
_RESERVED = {"format", "counters", "random"}


class Stateful(Protocol):
    """What a checkpoint can hold: a module, an optimizer, a scaler, a schedule, the executor, a sampler."""

    def state_dict(self) -> Any:
        """All that must survive a restart, as tensors, numbers, text and collections of them."""
        ...

    def load_state_dict(self, state_dict: Any, /) -> Any:
        """Continue from :meth:`state_dict`."""
        ...


def gather(parts: Mapping[str, Stateful], **counters: Any) -> dict[str, Any]:
    """The state of every part under its name, the ``counters``, and all random generators of this process.

    Args:
        parts: name → what moves while the run trains.
        counters: plain values that belong to it, such as the epoch.

    Raises:
        ValueError: a part has a name that the format uses itself.
    """
    taken = sorted(_RESERVED & set(parts))
    if taken:
        raise ValueError(f"a checkpoint uses the name {taken[0]!r} itself: give that part another")
    states = {name: part.state_dict() for name, part in parts.items()}
    return {"format": FORMAT, **states, "counters": counters, "random": random_state()}


def restore(state: Mapping[str, Any], parts: Mapping[str, Stateful]) -> dict[str, Any]:
    """Put what :func:`gather` took into parts that were made the same way; returns the counters.

    The random generators come last, since making and loading parts may draw.

    Raises:
        RunError: ``state`` has none for a part.
    """
    for name, part in parts.items():
        if name not in state:
            raise RunError(f"the checkpoint holds no {name!r}: it belongs to another run")
        part.load_state_dict(state[name])
    set_random_state(state["random"])
    return dict(state["counters"])


def random_state() -> dict[str, Any]:
    """Where every global generator stands: Python's, NumPy's, torch's, and those of the CUDA devices in use."""
    version, words, gauss = random.getstate()
    name, keys, *rest = np.random.get_state()  # noqa: NPY002 - what others draw from
    return {
        "python": [version, torch.tensor(words), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Continue from :func:`random_state`; the generator of a CUDA device that is not here is passed over."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    devices = torch.cuda.device_count() if state["cuda"] else 0
    for device, generator in enumerate(state["cuda"][:devices]):
        torch.cuda.set_rng_state(generator, device)


def save_file(file: Path, state: Mapping[str, Any]) -> dict[str, Any]:
    """Write ``state`` to ``file``, whole or not at all; returns its manifest: name, format, size and SHA-256.

    Raises:
        RunError: the disk is full or the folder cannot be written; what was there is as it was.
    """
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    content = buffer.getvalue()
    write_atomic(file, content)
    return {"file": file.name, "format": FORMAT, **_fingerprint(content)}


def load_file(file: Path, manifest: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The state in ``file``, its tensors on the CPU. Nothing in a file is ever executed (``weights_only=True``).

    Args:
        file: what :func:`save_file` wrote.
        manifest: what it returned, to tell a damaged file.

    Raises:
        RunError: it cannot be read, is damaged, or is no checkpoint at all.
        UsageError: it has a format that this version does not know.
    """
    try:
        content = file.read_bytes()
        if manifest is not None and {**manifest, **_fingerprint(content)} != manifest:
            raise ValueError("its size or SHA-256 is not that of its manifest")
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        version = state["format"]
    except Exception as error:  # a damaged archive can raise nearly anything
        raise RunError(f"{file} is damaged or no checkpoint ({_one_line(error)})") from error
    if version != FORMAT:
        raise UsageError(
            f"{file} has checkpoint format {version!r}, this adaptive_loss reads {FORMAT}: use the version that wrote "
            "it, or begin anew with --no-resume"
        )
    return state


class Checkpoints:
    """The last two checkpoints of an unfinished run, in a folder of their own.

    ``step_0000000200.pt`` is written under a temporary name, forced to disk and renamed; then its manifest
    ``step_0000000200.json``, likewise, and only with that the checkpoint counts; then older ones go. A kill between
    any two of these leaves the checkpoint before as it was.

    Args:
        folder: made by the first save.

    Example:
        >>> import tempfile, torch
        >>> from adaptive_loss.checkpoint import Checkpoints, gather, restore
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Checkpoints(folder).save(200, gather({"model": torch.nn.Linear(2, 1)}, epoch=3))
        ...     saved = Checkpoints(folder).load()
        >>> restore(saved, {"model": torch.nn.Linear(2, 1)})
        {'epoch': 3}
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._good: list[str] = []

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Write ``state``, a :func:`gather`, as the checkpoint after ``step`` steps.

        Raises:
            RunError: the disk is full or the folder cannot be written; the checkpoints before are as they were.
        """
        name = f"step_{step:010d}"
        manifest = save_file(self.folder / f"{name}.pt", state)
        write_atomic(self.folder / f"{name}.json", json_dump(manifest))
        self._good = [name, *(other for other in self._good if other != name)][:KEPT]
        self._drop_all_but(self._good)

    def load(self) -> dict[str, Any] | None:
        """The newest state that is whole, or None where there is none; every damaged one is told in a line.

        Raises:
            UsageError: it has a format that this version does not know.
        """
        names = sorted((file.stem for file in self.folder.glob("step_*.json")), reverse=True)
        for place, name in enumerate(names):
            try:
                state = load_file(self.folder / f"{name}.pt", self._manifest(name))
            except RunError as error:
                after = "going on from the one before" if names[place + 1 :] else "starting from the beginning"
                print(f"{error}; {after}", file=sys.stderr)
                continue
            self._good = names[place : place + KEPT]
            return state
        return None

    def clear(self) -> None:
        """Remove all of them, since the run is finished or begins anew."""
        if self.folder.is_dir():
            self._drop_all_but(())
            with contextlib.suppress(OSError):  # something of the user's lies there too
                self.folder.rmdir()

    def _manifest(self, name: str) -> dict[str, Any]:
        file = self.folder / f"{name}.json"
        try:
            return dict(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise RunError(f"{file} is damaged ({_one_line(error)})") from error

    def _drop_all_but(self, names: Collection[str]) -> None:
        # A manifest goes before its file, so that a kill leaves none without one.
        for pattern in ("step_*.json", "step_*.pt"):
            for file in self.folder.glob(pattern):
                if file.stem not in names:
                    file.unlink()
        remove_leftovers(self.folder)


def _fingerprint(content: bytes) -> dict[str, Any]:
    return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _one_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
