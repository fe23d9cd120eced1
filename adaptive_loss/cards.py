"""Cards: the JSON files of policies. They may come from anyone, and all they can do is be refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

LARGEST = 1 << 20
"""Bytes of a card that are read at most."""


def read_card(file: Path, what: str, parse: Callable[[Any], T], version: int) -> T:
    """What ``parse`` makes of the JSON in ``file``.

    Args:
        file: the card.
        what: what it is, as a message says it: ``"the monitor's card"``.
        parse: gives the object, or raises any of the errors that unexpected values cause.
        version: of the signals; a card of another one may well have other contents, so it is not parsed.

    Raises:
        ValueError: it cannot be read, is not what it should be, or was made for other signals.
    """
    try:
        with file.open("rb") as stream:
            content = stream.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise ValueError(f"it has more than {LARGEST} bytes")
        card = json.loads(content)
        theirs = card["signals_version"]
        result = parse(card) if theirs == version else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"cannot read {what} {file}: {type(error).__name__}: {error}") from error
    if result is None:
        raise ValueError(f"{file} was made for signals version {theirs!r}, this is {version}: train it anew")
    return result
