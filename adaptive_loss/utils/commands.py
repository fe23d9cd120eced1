"""What every command shares: flags parsed into a dataclass, and errors that are one line and an exit code."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Protocol, TypeVar, get_origin

from adaptive_loss.errors import RunError, Stopped, UsageError
from adaptive_loss.trainer.simple_ablation_analysis import printable

T = TypeVar("T")

PLUGINS = ("task", "dataset", "weighting", "weightings", "mode", "modes", "ablation_mode")
"""Flags that take the name of a plug-in, or ``package.module:Name``."""

ONCE = ("--weights", "--targets")
"""Flags that hold something for each of several terms, so that a second one looks as if it added to the first; of any
other flag the last one counts, so that a script's can be overridden."""


class Main(Protocol):
    """A command: takes its arguments, by default the process's own, and gives back the exit code."""

    def __call__(self, argv: Sequence[str] | None = None) -> int: ...


EXTRAS = {"joblib": "study", "optuna": "study", "scipy": "study", "tensorboard": "tensorboard", "matplotlib": "report",
          "jinja2": "report", "gymnasium": "rl", "stable_baselines3": "rl", "cma": "meta",
          "torchjd": "torchjd"}  # fmt: skip


def command(main: Callable[[Sequence[str] | None], int]) -> Main:
    """Turn the errors of a command's ``main(argv)`` into one ``error:`` line on stderr and its exit code."""

    @functools.wraps(main)
    def wrapped(argv: Sequence[str] | None = None) -> int:
        _escape_what_cannot_be_shown()
        try:
            with _terminable():
                return main(argv)
        except UsageError as error:
            return complain(error, 2)
        except RunError as error:
            return complain(error, 1)
        except OSError as error:
            return _closed_pipe() if isinstance(error, BrokenPipeError) else complain(_with_fix(error), 1)
        except ModuleNotFoundError as error:
            return complain(missing_extra(error), 1)
        except Stopped as stop:
            return complain(f"{stop}; run the same command again to go on", stop.code)
        except KeyboardInterrupt:
            return complain("interrupted; run the same command again to go on", 130)

    return wrapped


def _escape_what_cannot_be_shown() -> None:
    """On a terminal that has no σ its escape is printed, as it is on stderr, where the default would be a traceback."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends the command as an exception, which closes what is open, and not on the spot."""

    def stop(number: int, *_: object) -> None:
        raise Stopped("stopped by SIGTERM", 128 + number)

    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def complain(error: object, code: int) -> int:
    """Print ``error`` as one line on stderr, what could steer a terminal escaped, and give back ``code``."""
    print("error: " + printable(" ".join(str(error).split())), file=sys.stderr)
    return code


def _with_fix(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}; check the path, its rights and the free space"


def missing_extra(error: ModuleNotFoundError) -> str:
    """The line that names what to install for a module that is not there; raises ``error`` if it is no extra."""
    extra = EXTRAS.get((error.name or "").split(".")[0])
    if extra is None:
        raise error
    return f"{error.name} is not installed; run: pip install 'adaptive-loss[{extra}]'"


def _closed_pipe() -> int:
    # The reader of our output has gone (`| head`); what Python flushes at exit must not complain either.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1


def parse(cls: type[T], argv: Sequence[str] | None, prog: str, description: str) -> T:
    """An instance of the dataclass ``cls`` from command-line flags; hyphens and underscores are the same.

    Raises:
        UsageError: a flag that is unknown, lacks its value or has a wrong one.
        SystemExit: after ``--help`` was printed (code 0).
    """
    import tyro

    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured):
            flags = [field.name for field in dataclasses.fields(cls)]  # pyright: ignore[reportArgumentType]
            typed = list(sys.argv[1:] if argv is None else argv)
            _check_given_once(typed)
            args = expand_config(typed, flags)
            return tyro.cli(cls, args=args, prog=prog, description=description, registry=_registry())
    except SystemExit as stop:
        if not stop.code:
            raise
    raise UsageError(_one_line(captured.getvalue(), prog))


def _check_given_once(typed: Sequence[str]) -> None:
    for flag in ONCE:
        if sum(_is(word, flag) for word in typed) > 1:
            raise UsageError(f"{flag} is given twice; give every TERM=NUMBER after one")


def command_line(prog: str, argv: Sequence[str] | None) -> tuple[str, ...]:
    """The command as it was typed, for the provenance of its results."""
    return tuple(sys.orig_argv) if argv is None else (*prog.split(), *argv)


def expand_config(args: list[str], known: Collection[str]) -> list[str]:
    """``args`` with the flags of the file behind ``--config`` put before them, so that those typed win.

    Raises:
        UsageError: the file is missing, is no JSON object, or holds what is none of the ``known`` flags.
    """
    path = next((_value(args, i) for i, arg in enumerate(args) if _is(arg, "--config")), None)
    if path is None:
        return args
    try:
        with open(path, encoding="utf-8") as file:
            flags = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(
            f"--config {path}: cannot be read as JSON ({error}); name a file such as experiments/*.json"
        ) from None
    if not isinstance(flags, dict):
        raise UsageError(f"--config {path}: holds no JSON object of flags; see experiments/ for examples")
    strange = [name for name in flags if name.replace("-", "_") not in known]
    if strange:
        raise UsageError(f"--config {path}: {strange[0]!r} is no flag of this command; name a file made for it")
    for name, value in flags.items():
        _check_no_code(path, name, value)
    return [word for name, value in flags.items() for word in _as_flag(name, value)] + args


def _check_no_code(path: str, name: str, value: Any) -> None:
    """A file may come from anyone, so it may not name code outside the package to import; a command line may."""
    names = value if isinstance(value, list) else [value]
    outside = [item for item in map(str, names) if ":" in item and not item.startswith("torchjd:")]
    if outside and name.replace("-", "_") in PLUGINS:
        raise UsageError(
            f"--config {path}: {name} {outside[0]!r} is code outside the package, which a file may not name; "
            f"if you trust it, give --{name} on the command line"
        )


def _is(word: str, flag: str) -> bool:
    return word.partition("=")[0] == flag


def _value(args: list[str], at: int) -> str | None:
    _, equals, value = args[at].partition("=")
    return value if equals else args[at + 1] if at + 1 < len(args) else None


def _as_flag(name: str, value: Any) -> list[str]:
    """One entry of a configuration file as words of a command line."""
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    if isinstance(value, dict):
        return [f"--{flag}", *(f"{key}={item}" for key, item in value.items())] if value else []
    return [f"--{flag}", *map(str, value if isinstance(value, list) else [value])]


def parse_numbers(items: Sequence[str]) -> dict[str, float]:
    """``["kd=0.5", "conf=1"]`` as ``{"kd": 0.5, "conf": 1.0}``; ``ValueError`` for none, or one that cannot be read."""
    if not items:
        raise ValueError("no term is named; give TERM=NUMBER, or leave the flag out")
    numbers: dict[str, float] = {}
    for item in items:
        term, _, value = item.partition("=")
        try:
            number = float(value)
        except ValueError:
            raise ValueError(f"{item!r} is not TERM=NUMBER, such as {term or 'term'}=0.5") from None
        if not term or term in numbers:
            raise ValueError(f"{item!r} names {'a term twice' if term else 'no term'}; give TERM=NUMBER once a term")
        numbers[term] = number
    return numbers


def _registry() -> Any:
    """tyro's rules plus ours: a dictionary is written TERM=VALUE."""
    import tyro
    from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

    registry = ConstructorRegistry()

    @registry.primitive_rule
    def _(info: PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec[Any] | None:
        if get_origin(info.type) is not dict:
            return None
        return PrimitiveConstructorSpec(
            nargs="*",
            metavar="TERM=VALUE ...",
            instance_from_str=parse_numbers,
            is_instance=lambda value: isinstance(value, dict),
            str_from_instance=lambda value: [f"{term}={number}" for term, number in value.items()],
        )

    return registry


PHRASES = (
    (r"^Error parsing (--[\w-]+): (.*)$", r"\1: \2"),
    (r"invalid literal for int\(\) with base 10: ('.*')", r"\1 is not a whole number"),
    (r"could not convert string to float: ('.*')", r"\1 is not a number"),
    (r"^Missing from .+?: (\S+) (.*?)(?: \(required\))?$", r"\1 is missing: \2"),
    (r"no type matching \S+ could be instantiated from \[(.*?)\].*", r"\1 is not a value it takes"),
    (r"Could not find valid parse for arguments: \[(.*?)\].*", r"\1 is not a list of values it takes"),
    (r"^Unrecognized options: (.*)$", r"unknown option \1"),
    (r"^Missing value for argument '(--[\w-]+)'.*$", r"\1 needs a value"),
    (
        r"^invalid choice (.*) for argument '(--[\w-]+)'. Expected one of \((.*?),?\)\.?$",
        r"\2: unknown value \1; choose from: \3",
    ),
)


def _one_line(box: str, prog: str) -> str:
    """The message of the box that tyro draws around a parsing error, as one line of ours."""
    # The first row is the box's title. Where the output cannot show ─, the box has lines of hyphens and no sides.
    rows = [line.strip("│╭╮╰╯ ") for line in box.splitlines()[1:]]
    blocks = re.split(r"^(?:─+|-{3,})$", "\n".join(rows), flags=re.MULTILINE)
    parts = [" ".join(block.split()) for block in blocks if block.strip()]
    message = parts[0] if parts else "these flags cannot be read"
    for pattern, replacement in PHRASES:
        message = re.sub(pattern, replacement, message)
    hint = next((re.search(r"--[\w-]+", part) for part in parts if part.startswith("Perhaps you meant")), None)
    return f"{message}{f'; did you mean {hint.group()}?' if hint else ''} (see {prog} --help)"
