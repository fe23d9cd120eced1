"""``adaptive-loss pretrain monitor|controller``: make policies."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

from adaptive_loss.errors import UsageError
from adaptive_loss.utils.commands import command

WHAT = {
    "monitor": "adaptive_loss.meta.pretrain_monitor",
    "controller": "adaptive_loss.meta.pretrain_controller",
}


@command
def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    what, *rest = list(argv or ()) or ["--help"]
    if what in ("-h", "--help"):
        print("usage: adaptive-loss pretrain monitor|controller [OPTIONS]\n")
        print("Train the monitor's networks, or the controller's law, across many small runs; --help after either.")
        return 0
    if what not in WHAT:
        raise UsageError(f"pretrain: {what!r} is no policy; choose from: {', '.join(WHAT)}")
    return import_module(WHAT[what]).main(rest)
