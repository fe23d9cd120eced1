"""Policies on disk: tensors and a JSON card. They may come from anyone, and all they can do is be refused."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from adaptive_loss import signals
from adaptive_loss.records import json_dump, versions, write_atomic

POLICIES = Path(__file__).parent / "policies"
"""The package's own."""
LARGEST_CARD, LARGEST_TENSORS = 1 << 20, 1 << 24
"""Bytes that are read at most."""
TOLD = ("families", "seeds", "evidence", "made_by")
"""What a card must tell: task families and seeds of its training, what it was measured to be worth, the command."""

_ERRORS = (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, SafetensorError)


def write_policy(folder: str | Path, name: str, tensors: Mapping[str, Tensor], card: Mapping[str, Any]) -> None:
    """Write ``<name>.safetensors`` and ``<name>.json``, each as a whole or not at all.

    The tensors go first and the card, with their hash, last: what a kill between the two leaves is refused.

    Args:
        folder: made where it is not there.
        name: ``"controller"`` or ``"monitor"``.
        tensors: name → tensor; none makes a card that stands alone.
        card: at least what :data:`TOLD` lists; signals version, package versions and hash are added.

    Raises:
        ValueError: the card tells too little.
        RunError: the folder cannot be written.

    Example:
        >>> import tempfile
        >>> card = {"families": ["vae"], "seeds": [1], "evidence": "none yet", "made_by": "by hand", "rho": 0.5}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_policy(folder, "monitor", {"a": torch.ones(2)}, card)
        ...     card, tensors = read_policy(folder, "monitor")
        >>> card["rho"], tensors["a"].tolist()
        (0.5, [1.0, 1.0])
    """
    missing = [entry for entry in TOLD if entry not in card]
    if missing:
        raise ValueError(f"the card of policy {name!r} says nothing of {missing[0]!r}: give {', '.join(TOLD)}")
    file = Path(folder) / f"{name}.safetensors"
    known: dict[str, Any] = {"signals_version": signals.VERSION, **card, "versions": versions()}
    if tensors:
        content = save({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()})
        known["sha256"] = hashlib.sha256(content).hexdigest()
        write_atomic(file, content)
    write_atomic(file.with_suffix(".json"), json_dump(known))
    if not tensors:
        file.unlink(missing_ok=True)


def read_policy(folder: str | Path, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The card and the tensors that :func:`write_policy` wrote; no tensors where the card has no hash of any.

    Raises:
        ValueError: one line, naming the file: it is missing, too large, damaged, not what the card says, holds numbers
            that are not finite, or was made for signals of another version.
    """
    file = Path(folder) / f"{name}.json"
    with refusing(file):
        card = json.loads(_content(file, LARGEST_CARD))
        theirs = card["signals_version"]
    if theirs != signals.VERSION:
        raise ValueError(f"{file} was made for signals version {theirs!r}, this is {signals.VERSION}: train it anew")
    beside = file.with_suffix(".safetensors")
    with refusing(beside):
        return card, _tensors(beside, card.get("sha256"))


@contextlib.contextmanager
def refusing(file: Path) -> Iterator[None]:
    """Make one line, a ValueError that names ``file``, of whatever its contents raise."""
    try:
        yield
    except _ERRORS as error:
        why = " ".join(str(error).split())[:200]
        raise ValueError(f"cannot read the policy {file}: {type(error).__name__}: {why}") from error


def check_like(tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> None:
    """Refuse tensors whose names, shapes or number formats are not those of ``like``.

    Raises:
        ValueError: with the first difference.
    """
    for name in sorted({*tensors, *like}):
        if name not in tensors or name not in like:
            raise ValueError(f"it {'lacks' if name in like else 'holds a foreign'} tensor {name!r}")
        found, wanted = (f"{one.dtype} {list(one.shape)}" for one in (tensors[name], like[name]))
        if found != wanted:
            raise ValueError(f"its tensor {name!r} is {found}, not {wanted}")


def _tensors(file: Path, sha256: object) -> dict[str, Tensor]:
    if sha256 is None:
        if file.exists():
            raise ValueError("its card has no sha256 of it")
        return {}
    content = _content(file, LARGEST_TENSORS)
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ValueError("its sha256 is not the one on its card")
    tensors = load(content)
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"its tensor {name!r} is not finite")
    return tensors


def _content(file: Path, most: int) -> bytes:
    with file.open("rb") as stream:
        content = stream.read(most + 1)
    if len(content) > most:
        raise ValueError(f"it has more than {most} bytes")
    return content
