"""The command ``adaptive-loss``: hands over to a subcommand, and imports nothing heavy itself."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence

from adaptive_loss import __version__

COMMANDS = {
    "demo": ("adaptive_loss.demo:main", "train fixed against adaptive on embedded data, in under two minutes"),
    "train": ("adaptive_loss.trainer.train_task:main", "train one task once"),
    "phase1": (
        "adaptive_loss.trainer.run_phase1_experiments:main",
        "fixed against adaptive weights over several seeds",
    ),
    "ablate": ("adaptive_loss.trainer.run_ablation_study:main", "each component alone, both together, and controls"),
    "tune": ("adaptive_loss.trainer.tune_task:main", "search a task's best fixed weights: what `tuned` means"),
    "compare": ("adaptive_loss.trainer.compare:main", "rules, modes and tuned weights on a task, paired by seed"),
    "arena": ("adaptive_loss.trainer.arena:main", "families × rules × starts: what each recovers of what tuning gains"),
    "pretrain": ("adaptive_loss.meta.pretrain:main", "train a monitor or a controller across many small runs"),
    "evidence": ("adaptive_loss.meta.evidence:main", "what a policy's monitor wins on runs that it never saw"),
    "analyze": ("adaptive_loss.trainer.simple_ablation_analysis:main", "what an ablation showed, paired by seed"),
    "rules": ("adaptive_loss.catalogue:main", "every weighting rule, what it needs, and its page"),
    "picture": ("adaptive_loss.picture:main", "what the weights and losses of one run did"),
    "rebuild": ("adaptive_loss.rebuild:main", "results and TensorBoard files again, from the ledger and the logs"),
    "doctor": ("adaptive_loss.doctor:main", "versions, devices, disk and determinism here"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the subcommand that the first argument names; returns the exit code."""
    name, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help", "help"):
        print(usage())
        return 0
    if name == "--version":
        print(f"adaptive-loss {__version__}")
        return 0
    if name not in COMMANDS:
        return _unknown(name)
    module, _, function = COMMANDS[name][0].partition(":")
    try:
        return getattr(importlib.import_module(module), function)(rest)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130


def usage() -> str:
    """The text of ``--help``."""
    lines = [f"  {name:<9}{summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: adaptive-loss COMMAND [OPTIONS]",
            "",
            "Real-time adaptive loss functions: loss weights that change while a model trains.",
            "",
            *lines,
            "",
            "adaptive-loss COMMAND --help shows a command's options; --json prints its result as one JSON document.",
            "adaptive-loss --version shows the version.",
        ]
    )


def _unknown(name: str) -> int:
    close = difflib.get_close_matches(name, COMMANDS, 1)
    hint = f"did you mean {close[0]}?" if close else f"choose from: {', '.join(COMMANDS)}"
    print(f"error: unknown command {name!r}; {hint}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
