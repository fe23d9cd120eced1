"""Plug-ins: a rule, dataset, model, task or mode is one new file in its folder.

The file's name is the plug-in's name, so a command can list the choices without importing anything heavy;
the file registers its object under that name with a decorator.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from adaptive_loss.errors import UsageError

T = TypeVar("T")


class Registry:
    """Named objects of one kind, one file each, found by file name and imported on first use.

    Args:
        kind: what the objects are, as an error message says it ("weighting").
        package: the package whose modules hold them, one each.
        aliases: other spellings, mapped to the file's name.
        not_plugins: modules of that package which hold no plug-in.

    Example:
        >>> from adaptive_loss.registry import Registry
        >>> "dwa" in Registry("weighting", "adaptive_loss.weighting", not_plugins=("base",)).names()
        True
    """

    def __init__(
        self, kind: str, package: str, *, aliases: Mapping[str, str] | None = None, not_plugins: tuple[str, ...] = ()
    ) -> None:
        self.kind = kind
        self.package = package
        self.aliases = dict(aliases or {})
        self._not_plugins = set(not_plugins)
        self._objects: dict[str, Any] = {}

    def names(self) -> list[str]:
        """The names of the folder's plug-ins, sorted, without importing them."""
        folder = Path(__file__).parent.joinpath(*self.package.split(".")[1:])
        stems = {file.stem for file in folder.glob("*.py") if not file.stem.startswith("_")}
        return sorted((stems - self._not_plugins) | set(self._objects))

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that files an object under ``name``; a name taken by another object raises ``ValueError``."""

        def decorate(item: T) -> T:
            known = self._objects.setdefault(name, item)
            if _origin(known) != _origin(item):
                raise ValueError(f"{self.kind} {name!r} is registered twice: {_origin(known)} and {_origin(item)}")
            self._objects[name] = item
            return item

        return decorate

    def resolve(self, name: str, *, flag: str = "", also: Iterable[str] = ()) -> str:
        """The canonical name behind ``name``, hyphens or underscores; raises :class:`UsageError` with the choices.

        Args:
            flag: where ``name`` was given, for the message.
            also: names that only the caller knows; they are choices too.
        """
        canonical = name.replace("-", "_")
        canonical = self.aliases.get(canonical, canonical)
        known = {*self.names(), *also}
        if ":" not in canonical and canonical not in known:
            choices = ", ".join(sorted(known | set(self.aliases)))
            raise UsageError(f"{flag}{': ' * bool(flag)}unknown {self.kind} {name!r}; choose from: {choices}")
        return canonical

    def get(self, name: str) -> Any:
        """The object called ``name``, or the one at ``"package.module:Name"`` outside this package."""
        canonical = self.resolve(name)
        if ":" in canonical:
            return self._outside(canonical)
        if canonical not in self._objects:
            importlib.import_module(f"{self.package}.{canonical}")
        if canonical not in self._objects:
            raise RuntimeError(f"{self.package}.{canonical} registers no {self.kind} called {canonical!r}")
        return self._objects[canonical]

    def _outside(self, path: str) -> Any:
        module, _, attribute = path.partition(":")
        if not all(part.isidentifier() for part in (*module.split("."), attribute)):
            raise UsageError(f"cannot load {self.kind} {path!r}: write it as package.module:Name")
        try:
            return getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise UsageError(f"cannot load {self.kind} {path!r}: {error}") from error


def _origin(item: Any) -> str:
    return f"{getattr(item, '__module__', '?')}.{getattr(item, '__qualname__', repr(item))}"
