"""Tells Gymnasium of the environment, at the price of nothing where Gymnasium is never imported."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

GYMNASIUM = "gymnasium"


def announce() -> None:
    """Register the environment: at once where Gymnasium is there, else as soon as it is imported.

    Gymnasium has no entry point for others, and to import it here would import NumPy for everybody.
    """
    there = sys.modules.get(GYMNASIUM)
    if there is not None:
        register(there)
    else:
        sys.meta_path.insert(0, OnImport())


def register(gymnasium: ModuleType) -> None:
    """Register ``adaptive_loss/LossWeighting-v0``; nothing of it is imported before it is made."""
    gymnasium.register(id="adaptive_loss/LossWeighting-v0", entry_point="adaptive_loss.meta.env:LossWeighting")


class OnImport(MetaPathFinder):
    """Finds Gymnasium as the others would, once, and registers the environment when its import is done."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of Gymnasium, its loader followed by :func:`register`; None for any other module."""
        if fullname != GYMNASIUM:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def load_and_register(module: ModuleType) -> None:
            load(module)
            register(module)

        spec.loader.exec_module = load_and_register  # pyright: ignore[reportAttributeAccessIssue]
        return spec
