"""CSV, JSON, pictures and the terminal: hostile names and numbers come out inert, and showing them asks no network."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

from adaptive_loss import cli
from adaptive_loss.errors import UsageError
from adaptive_loss.ledger import Ledger
from adaptive_loss.picture import draw
from adaptive_loss.records import FORMULA, json_dump
from adaptive_loss.records import Row as ResultRow
from adaptive_loss.utils.commands import complain
from adaptive_loss.utils.logging import RunLogger, progress
from tests.reliability.rows import Row
from tests.reliability.stub_study import ended, forked

NAMES = (
    *(
        "<script>alert(1)</script>",
        "<img src=x onerror=alert(1)>",
        '"><svg/onload=alert(1)>',
        "&#60;script&#62;",
        "]]>",
    ),
    *(
        "=cmd|'/c calc'!A1",
        "+1+1",
        "-2+3",
        "@SUM(A1)",
        " =1+1",
        "\t=1+1",
        "\r=1+1",
        "＝1+1",
        '=HYPERLINK("http://x/","y")',
    ),
    *(
        "\x1b[2J\x1b[31m",
        "\x1b]0;owned\x07",
        "a\x08b",
        "\u202eevil",
        "\u2028line",
        "\x9b31m",
        "a\nb,c",
        'a"b',
        "../../etc/x",
    ),
    *("$\\input{/etc/passwd}$", "%s%n{0}", "https://example.invalid/x.png", "javascript:alert(1)", "\0null", "é" * 300),
)
NUMBERS = (math.nan, math.inf, -math.inf, 1e-320, 1.7e308, -0.0)
REFUSED = (
    *("socket.connect", "socket.getaddrinfo", "socket.sendto", "socket.bind", "webbrowser.", "urllib."),
    *("subprocess.", "os.system", "os.exec", "os.posix_spawn"),
)


def torture() -> list[Row]:
    """Every name in every place that a name can reach."""
    return [inert(), offline()]


def inert() -> Row:
    """Every hostile name through every file and line that shows it."""
    faults, tried = Counter[str](), 0
    for check in (_csv, _json, _terminal, _results, _picture):
        for name in NAMES if check is not _picture else (None,):
            tried += 1
            with tempfile.TemporaryDirectory() as folder, _quiet():
                fault = check(Path(folder), name or "")
            faults[f"{check.__name__[1:]} {name!r}: {fault}"] += fault is not None
    found = [fault for fault, count in faults.items() if count]
    return Row("CSV, JSON, SVG, terminal: hostile names run nothing", tried, len(found), "; ".join(found)[:300])


def offline() -> Row:
    """The commands that show results open no socket and start no process."""
    with tempfile.TemporaryDirectory() as root:
        said = Path(root, "said.txt")
        code = ended(forked(partial(_watched, Path(root, "study")), said))
        text = said.read_text()
        asked = sorted(set(re.findall(r"^asked: (.*)$", text, re.MULTILINE)))
    note = ", ".join(asked) if code == 0 else text[-300:]
    return Row("showing results makes no network request", len(SHOWN), len(asked) or int(code != 0), note)


SHOWN: tuple[Callable[[Path], object], ...] = (
    lambda study: cli.main(["analyze", str(study)]),
    lambda study: cli.main(["picture", str(study / "full/seed_1"), "--format", "svg"]),
    lambda study: cli.main(["rebuild", str(study)]),
)


def _watched(study: Path) -> int:
    """Show a study, and say what that asked of the network; in a process of its own, since no hook can be taken out."""
    asked: list[str] = []
    _study(study)
    sys.addaudithook(lambda event, args: asked.append(event) if event.startswith(REFUSED) else None)
    for show in SHOWN:
        show(study)
    print("\n".join(f"asked: {event}" for event in asked))
    return 0


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def _study(folder: Path) -> None:
    with Ledger(folder) as ledger:
        ledger.begin(folder / "ablation_results.csv", {"modes": ["full"], "seeds": [1]}, [], {"command": NAMES[0]})
        ledger.add(ResultRow.failed("full", 1, " ".join(NAMES)))
        ledger.write_results()
    _run(folder / "full/seed_1")


def _run(folder: Path) -> None:
    with RunLogger(folder, tensorboard=False) as log:
        for step in (10, 20):
            terms = {f"{kind}_{name}": 0.5 for kind in ("loss", "weight") for name in NAMES}
            log.epoch({"epoch": step // 10, "step": step, **terms})
            log.event(step, "action", NAMES[0])
            log.scalars(step, dict.fromkeys(NAMES, 0.5))


def _csv(folder: Path, name: str) -> str | None:
    """The metrics of a run: as many cells as columns, none a formula, none with a control character."""
    with RunLogger(folder, tensorboard=False) as log:
        log.epoch({name: name, **{str(place): value for place, value in enumerate(NUMBERS)}})
    with (folder / "metrics.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file, strict=True))
    if [len(row) for row in rows] != [1 + len(NUMBERS)] * 2:
        return "other cells"
    if any(not cell.isprintable() or cell.lstrip()[:1] in FORMULA for cell in (rows[0][0], rows[1][0])):
        return "a live cell"
    return None if rows[1][1:4] == [""] * 3 else "a number that is none"


def _json(folder: Path, name: str) -> str | None:
    """Events and curves: strict JSON, a line each, the name as it was."""
    with RunLogger(folder, tensorboard=False) as log:
        log.event(1, name, name, value=dict(zip("abcdef", NUMBERS, strict=True)))
        log.scalars(1, {name: 0.5})
    for file, found in (("events.jsonl", "reason"), ("tb/scalars.jsonl", "values")):
        content = (folder / file).read_bytes()
        record = json.loads(content, parse_constant=lambda constant: 1 / 0)
        if content.count(b"\n") != 1 or not content.isascii() or name not in record[found]:
            return f"{file} differs"
    return None if json.loads(json_dump({name: NUMBERS}))[name][:3] == [None] * 3 else "a number that is none"


def _terminal(folder: Path, name: str) -> str | None:
    """Errors and progress: nothing but what can be printed."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        complain(UsageError(f"unknown term {name}"), 2)
    with progress(2, name, stream=said, clock=lambda: 0.0) as bar:
        bar.update(1, name)
    lines = said.getvalue().split("\n")
    return None if len(lines) == 3 and all(map(str.isprintable, lines)) else "what steers a terminal"


def _results(folder: Path, name: str) -> str | None:
    """A study's results: as a mode it is refused or harmless, as a reason it is one cell; the analysis shows it."""
    row = ResultRow.failed("full", 1, name)
    with contextlib.suppress(UsageError):
        row = ResultRow(name, 1)
        if not name.isprintable() or name[:1] in FORMULA or "<" in name:
            return "a live mode"
        return None
    with Ledger(folder) as ledger:
        ledger.begin(folder / "ablation_results.csv", {"modes": ["full"], "seeds": [1]}, [], {})
        ledger.add(row)
        ledger.write_results()
    with (folder / "ablation_results.csv").open(newline="", encoding="utf-8") as file:
        cells = list(csv.reader(file, strict=True))[1]
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        cli.main(["analyze", str(folder)])
    clean = all(map(str.isprintable, [*cells, *said.getvalue().split("\n")]))
    return None if clean and not any(cell[:1] in FORMULA for cell in cells) else "a live cell"


def _picture(folder: Path, name: str) -> str | None:
    """A picture of terms with all those names at once: XML without scripts, handlers or outside references."""
    _run(folder)
    for file in draw(folder, folder, "svg"):
        for node in ElementTree.parse(file).iter():
            tag = node.tag.rpartition("}")[2].lower()
            if tag in ("script", "foreignobject", "image", "iframe", "a"):
                return f"<{tag}> in {file.name}"
            for key, value in node.attrib.items():
                key = key.rpartition("}")[2].lower()
                if key.startswith("on") or (key == "href" and not value.startswith("#")):
                    return f"{key}={value[:40]} in {file.name}"
    return None
