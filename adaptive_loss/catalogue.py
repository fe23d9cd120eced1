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
from adaptive_loss.weighting._torchjd_methods import METHODS
from adaptive_loss.weighting.base import NEEDS
from adaptive_loss.weighting.torchjd import Scalarized, TorchJD

PROG = "adaptive-loss rules"
COSTS = {
    "host": "a few microseconds",
    "heads": "one pass through the heads a term, every refresh",
    "solver": "one pass through the heads a term and a solver, every refresh",
}
"""Cost class of a rule: what it adds to a step."""


@dataclass(frozen=True)
class Rule:
    """One line of the catalogue.

    Args:
        name: what ``weighting=`` takes.
        family: where the rule's evidence comes from.
        needs: what the user must give it besides the losses.
        cost: its class, a key of :data:`COSTS`.
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
    """The catalogue's line about the rule called ``name``; imports its file, but not TorchJD for a short name."""
    short = _short(name)
    if short is not None:
        needs = ("gradients", "base") if short == "pcd" else ("gradients",)
        return Rule(short, "gradients, by TorchJD", needs, "solver", METHODS[TORCHJD[short]].summary)
    rule = weightings.get(name)
    summary = (inspect.getdoc(rule) or "").partition("\n\n")[0].replace("\n", " ")
    return Rule(name, rule.family, rule.needs, "heads" if "gradients" in rule.needs else "host", summary)


def _short(name: str) -> str | None:
    """The short name of one of TorchJD's rules, if it has one."""
    full = weightings.resolve(name)
    return next((short for short, method in TORCHJD.items() if full == f"torchjd:{method}"), None)


def catalogue() -> list[Rule]:
    """Every rule, by family and name; TorchJD's by what is known of them without it."""
    return sorted(map(entry, [*weightings.names(), *TORCHJD]), key=lambda rule: (rule.family, rule.name))


def page(name: str) -> str:
    """The rule's page in Markdown: what it is, how it is called, its docstring, and its pure functions'."""
    rule = entry(name)
    needs = ", ".join(rule.needs) or "nothing but the losses"
    head = [f"# {rule.name}", f"*{rule.family}; needs {needs}; {COSTS[rule.cost]}*", rule.summary]
    head += [f"Needs {need}: {NEEDS[need]}." for need in rule.needs if need in NEEDS]
    head += [f'`LossExecutor(..., weighting="{rule.name}")`, or with other settings than these:']
    body = _of_torchjd(TORCHJD[rule.name]) if rule.name in TORCHJD else _of_class(weightings.get(name))
    return "\n\n".join([*head, *body]) + "\n"


def _of_class(kind: type) -> list[str]:
    """Call, docstring without its first line, and the pure functions."""
    theirs = issubclass(kind, (TorchJD, Scalarized))
    call = _made("torchjd_rule", f'(n_terms, "{kind.method}", **options)') if theirs else _made(kind, _signature(kind))
    _, _, text = (inspect.getdoc(kind) or "").partition("\n\n")
    functions = {} if theirs else _functions(kind)
    return [call, markdown(text), *(f"## {name}\n\n{functions[name]}" for name in sorted(functions))]


def _of_torchjd(method: str) -> list[str]:
    """Call, what is known of the method, and what the adapter does with it."""
    about, (_, _, text) = METHODS[method], (inspect.getdoc(TorchJD) or "").partition("\n\n")
    options = f", {about.options}" if about.options else ""
    return [
        _made("torchjd_rule", f'(n_terms, "{method}"{options})'),
        f"{about.maths}\n\nReference: {about.reference}\n\nChoose it when {about.choose}.",
        f"## Through the adapter\n\n{markdown(text)}",
    ]


def _made(called: type | str, arguments: str) -> str:
    """How a rule is made by hand, as code."""
    module, name = (TorchJD.__module__, called) if isinstance(called, str) else (called.__module__, called.__name__)
    return f"```python\nfrom {module} import {name}\n\n{name}{arguments}\n```"


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


def _signature(called: Callable[..., object]) -> str:
    signature = inspect.signature(called)
    if inspect.isclass(called):
        signature = signature.replace(return_annotation=inspect.Signature.empty)
    # Annotations are postponed, so they come as quoted text.
    return re.sub(r"(: |-> )'([^']*)'", r"\1\2", str(signature))


def _row(rule: Rule) -> str:
    summary = rule.summary.replace("|", "\\|")
    needs = ", ".join(rule.needs) or "-"
    return f"| [{rule.name}]({rule.name}.md) | {rule.family} | {needs} | {rule.cost} | {summary} |"


def pages() -> dict[str, str]:
    """File name → text of every page, and of the table that links to them."""
    head = ["# Weighting rules", "", "| rule | family | needs | cost | what it does |", "|---|---|---|---|---|"]
    costs = ["", "What a rule adds to a step, by its cost class:", "", *(f"- {c}: {text}" for c, text in COSTS.items())]
    index = "\n".join([*head, *map(_row, catalogue()), *costs]) + "\n"
    return {"README.md": index} | {f"{name}.md": page(name) for name in [*weightings.names(), *TORCHJD]}


def table(rules: Sequence[Rule]) -> str:
    """The catalogue as aligned text."""
    width = max(len(rule.name) for rule in rules)
    lines = []
    for family in dict.fromkeys(rule.family for rule in rules):
        lines.append(f"{family}:")
        for rule in (rule for rule in rules if rule.family == family):
            needs = f"needs {', '.join(rule.needs)}; " if rule.needs else ""
            lines.append(f"  {rule.name:<{width}}  {rule.summary}  [{needs}cost {rule.cost}]")
    lines += [f"cost {name}: {text}" for name, text in COSTS.items()]
    return "\n".join([*lines, f"{len(rules)} rules; `{PROG} NAME` shows a rule's formula, reference and defaults"])


@command
def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    flags = parse(Flags, argv, PROG, "List the weighting rules, or show one.")
    if flags.write is not None:
        flags.write.mkdir(parents=True, exist_ok=True)
        files = {flags.write / name: text for name, text in pages().items()}
        for file, text in files.items():
            write_atomic(file, text)
        print(json.dumps({"files": [str(file) for file in files]}) if flags.json else f"written: {flags.write}")
    elif flags.name is not None:
        print(json.dumps(asdict(entry(flags.name))) if flags.json else page(flags.name).rstrip())
    else:
        rules = catalogue()
        print(json.dumps([asdict(rule) for rule in rules]) if flags.json else table(rules))
    return 0


if __name__ == "__main__":
    sys.exit(main())
