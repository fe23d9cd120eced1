"""The catalogue of weighting rules: ``adaptive-loss rules``, and one page a rule made from its docstring."""

from __future__ import annotations

import inspect
import json
import re
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import tyro

from adaptive_loss.records import write_atomic
from adaptive_loss.utils.commands import command, parse
from adaptive_loss.weighting import TORCHJD, weightings

PROG = "adaptive-loss rules"
COSTS = {True: "one pass through the heads a term, every refresh", False: "a few microseconds"}
"""What a step pays, by whether the rule takes gradients."""


@dataclass(frozen=True)
class Rule:
    """One line of the catalogue.

    Args:
        name: what ``weighting=`` takes.
        family: where the rule's evidence comes from.
        needs: what the user must give it besides the losses.
        cost: what it adds to a step.
        summary: the first line of its docstring.
    """

    name: str
    family: str
    needs: tuple[str, ...]
    cost: str
    summary: str


@dataclass(frozen=True, kw_only=True)
class Flags:
    """The flags of the catalogue."""

    name: tyro.conf.Positional[str | None] = None
    """A rule whose page is wanted; every rule in one table where it is not given."""
    write: Path | None = None
    """Write a page a rule into this folder."""
    json: bool = False
    """Print one JSON document instead of a table."""


def entry(name: str) -> Rule:
    """The catalogue's line about the rule called ``name``; imports its file."""
    rule = weightings.get(name)
    summary = (inspect.getdoc(rule) or "").partition("\n\n")[0].replace("\n", " ")
    return Rule(name, rule.family, rule.needs, COSTS["gradients" in rule.needs], summary)


def catalogue() -> list[Rule]:
    """Every rule, by family and name; TorchJD's by what is known of them without it."""
    ours = [entry(name) for name in weightings.names()]
    theirs = [_by_torchjd(short, method) for short, method in TORCHJD.items()]
    return sorted(ours + theirs, key=lambda rule: (rule.family, rule.name))


def _by_torchjd(short: str, method: str) -> Rule:
    needs = ("gradients", "base") if method == "PCD" else ("gradients",)
    return Rule(short, "gradients, by TorchJD", needs, f"{COSTS[True]}, and a solver", f"{method}, from the Gramian.")


def page(name: str) -> str:
    """The rule's page in Markdown: what it is, how it is called, its docstring, and its pure functions'."""
    rule, kind = entry(name), weightings.get(name)
    parts = [f"# {name}", f"*{rule.family}; needs {', '.join(rule.needs) or 'nothing but the losses'}; {rule.cost}*"]
    parts += [f'`LossExecutor(..., weighting="{name}")`', markdown(inspect.getdoc(kind) or "")]
    for function, text in sorted(_functions(kind).items()):
        parts += [f"## {function}", text]
    return "\n\n".join(parts) + "\n"


def markdown(docstring: str) -> str:
    """A docstring of our style as Markdown: sections as lists, examples as code, cross-references as names.

    Example:
        >>> print(markdown("As :class:`~adaptive_loss.errors.RunError` says."))
        As `RunError` says.
    """
    text = re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"`\1`", docstring).replace("``", "`")
    head, *rest = re.split(r"^(Args|Returns|Raises|Example|Attributes):\n", text, flags=re.MULTILINE)
    sections = [head.strip()]
    for title, body in zip(rest[::2], rest[1::2], strict=True):
        lines = textwrap.dedent(body).strip()
        sections += [f"**{title}**", f"```python\n{lines}\n```" if title == "Example" else _items(lines)]
    return "\n\n".join(sections)


def _items(lines: str) -> str:
    """The entries of a section as a list; an entry's further lines are indented."""
    return "\n".join("- " + " ".join(item.split()) for item in re.split(r"\n(?=\S)", lines))


def _functions(kind: type) -> Mapping[str, str]:
    """Signature and docstring of every public function in the rule's own file."""
    module = sys.modules[kind.__module__]
    own = {n: f for n, f in inspect.getmembers(module, inspect.isfunction) if f.__module__ == module.__name__}
    return {
        name: f"`{name}{_signature(function)}`\n\n{markdown(inspect.getdoc(function) or '')}"
        for name, function in own.items()
        if not name.startswith("_")
    }


def _signature(function: Callable[..., object]) -> str:
    # Annotations are postponed, so they come as quoted text.
    return str(inspect.signature(function)).replace("'", "")


def _row(rule: Rule) -> str:
    name = rule.name if rule.name in TORCHJD else f"[{rule.name}]({rule.name}.md)"
    summary = rule.summary.replace("|", "\\|")
    return f"| {name} | {rule.family} | {', '.join(rule.needs) or '-'} | {summary} |"


def pages() -> dict[str, str]:
    """File name → text of every page, and of the table that links to them."""
    head = ["# Weighting rules", "", "| rule | family | needs | what it does |", "|---|---|---|---|"]
    index = "\n".join([*head, *map(_row, catalogue())]) + "\n"
    return {"README.md": index} | {f"{name}.md": page(name) for name in weightings.names()}


def table(rules: Sequence[Rule]) -> str:
    """The catalogue as aligned text."""
    width = max(len(rule.name) for rule in rules)
    lines = []
    for family in dict.fromkeys(rule.family for rule in rules):
        lines.append(f"{family}:")
        for rule in (rule for rule in rules if rule.family == family):
            needs = f"  [needs {', '.join(rule.needs)}]" if rule.needs else ""
            lines.append(f"  {rule.name:<{width}}  {rule.summary}{needs}")
    return "\n".join([*lines, f"{len(rules)} rules; `{PROG} NAME` shows a rule's formula, reference and defaults"])


@command
def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    flags = parse(Flags, argv, PROG, "List the weighting rules, or show one.")
    if flags.write is not None:
        flags.write.mkdir(parents=True, exist_ok=True)
        for file, text in pages().items():
            write_atomic(flags.write / file, text)
        print(f"written: {flags.write}")
    elif flags.name is not None:
        print(json.dumps(asdict(entry(flags.name))) if flags.json else page(weightings.resolve(flags.name)).rstrip())
    else:
        rules = catalogue()
        print(json.dumps([asdict(rule) for rule in rules]) if flags.json else table(rules))
    return 0


if __name__ == "__main__":
    sys.exit(main())
