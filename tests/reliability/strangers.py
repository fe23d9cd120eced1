"""Files from strangers: payloads that run code where a file is unpickled, and everything else mutated at random."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import pickle
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from safetensors.torch import save_file

from adaptive_loss import LossExecutor, checkpoint, signals
from adaptive_loss.data import cifar10_loader, digits
from adaptive_loss.errors import RunError
from adaptive_loss.ledger import FILE_NAME, Ledger
from adaptive_loss.loss_monitor import LossMonitor
from adaptive_loss.meta_controller import CLIMB, MetaController
from adaptive_loss.picture import curves, intervention_steps, monitor_text
from adaptive_loss.policy_files import POLICIES
from adaptive_loss.rebuild import read_scalars
from adaptive_loss.records import Row as ResultRow
from adaptive_loss.records import read_results
from adaptive_loss.rl.networks import stack
from adaptive_loss.rl.nudges import MonitorConfig, new_network
from adaptive_loss.trainer.studies import Spec, finished, stored_config
from adaptive_loss.utils.commands import expand_config
from adaptive_loss.utils.config import RunConfig, to_json
from adaptive_loss.utils.logging import SCALARS, RunLogger
from tests.reliability.rows import Row

Reader = Callable[[Path], object]
NEWEST = "checkpoints/step_0000000001.pt"
CLEAN = (ValueError, RunError, OSError)
"""What a reader may raise: a command makes one line of each."""


def torture(mutations: int = 4000) -> list[Row]:
    """Every payload against every reader that could take it, and 4,000 mutated files."""
    return [payloads(), mutated(mutations)]


# Payloads -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bomb:
    """An object whose unpickling calls ``function(*arguments)``."""

    function: Callable[..., object]
    arguments: tuple[object, ...]

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.function, self.arguments


def bombs(canary: Path) -> dict[str, Bomb]:
    """Objects that make the file ``canary`` when they are unpickled."""
    line = f"open({str(canary)!r}, 'w').close()"
    return {
        "os.system": Bomb(os.system, (f"touch {canary}",)),
        "os.mkdir": Bomb(os.mkdir, (str(canary),)),
        "exec": Bomb(exec, (line,)),
        "eval": Bomb(eval, (line,)),
        "subprocess.run": Bomb(subprocess.run, (["touch", str(canary)],)),
        "open": Bomb(open, (str(canary), "w")),
    }


CONTAINERS: dict[str, Callable[[object], bytes]] = {
    "pickle": pickle.dumps,
    "old pickle": lambda bomb: pickle.dumps(bomb, protocol=0),
    "checkpoint": lambda bomb: _saved({"model": bomb}),
    "legacy checkpoint": lambda bomb: _saved({"executor": {"weights": bomb}}, _use_new_zipfile_serialization=False),
    "array": lambda bomb: _array(bomb),
}


def _saved(value: object, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def _array(bomb: object) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, images=np.array([bomb], dtype=object), labels=np.zeros(1))
    return buffer.getvalue()


def payloads() -> Row:
    """30 files of bombs, and names that could be imported, called or calculated, given to every reader."""
    executed, tried = [], 0
    for name in bombs(Path("canary")):
        for container, packed in CONTAINERS.items():
            with tempfile.TemporaryDirectory() as root:
                canary = Path(root, "canary")
                content = packed(bombs(canary)[name])
                _give_to_all(content, Path(root))
                tried += 1
                executed += [f"{name} in a {container}"] if canary.exists() else []
    for name in ("evil:Rule", "evil:Bomb", "os:system"):
        tried += 1
        executed += [name] if _imports(name) else []
    return Row("files from strangers: nothing in them is executed", tried, len(executed), ", ".join(executed))


def _give_to_all(content: bytes, root: Path) -> None:
    """Put ``content`` in the place of every file that is read, and read it."""
    for number, (place, reader) in enumerate(READERS.items()):
        folder = root / str(number)
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).write_bytes(content)
        with contextlib.suppress(Exception):
            reader(folder)


def _imports(name: str) -> bool:
    """Whether a configuration file that names ``package.module:Name`` makes the commands import it."""
    with tempfile.TemporaryDirectory() as root:
        canary = Path(root, "canary")
        Path(root, "evil.py").write_text(f"open({str(canary)!r}, 'w').close()")
        Path(root, "flags.json").write_text(json.dumps({"weighting": name, "dataset": "digits"}))
        command = [sys.executable, "-m", "adaptive_loss", "phase1", "--config", "flags.json", "--dry-run"]
        paths = os.pathsep.join([root, str(Path(__file__).parents[2])])
        done = subprocess.run(command, cwd=root, env={**os.environ, "PYTHONPATH": paths}, capture_output=True)
        return canary.exists() or done.returncode != 2


# Readers ------------------------------------------------------------------------------------------------------


def _executor() -> LossExecutor:
    return LossExecutor.adaptive({"ce": 1.0, "mix": 1.0}, base="ce")


def _state(folder: Path) -> None:
    _executor().load_state_dict(torch.load(folder / "state.pt", weights_only=True))


def _resume(folder: Path, forged: bool) -> None:
    """Look for a checkpoint to go on from; its manifest may be made to fit, as a stranger can."""
    file = folder / NEWEST
    if forged:
        fitting = checkpoint._fingerprint(file.read_bytes())
        file.with_suffix(".json").write_text(json.dumps(fitting))
    with contextlib.redirect_stderr(io.StringIO()):
        checkpoint.Checkpoints(file.parent).load()


def _policy(folder: Path, kind: type[MetaController] | type[LossMonitor], name: str) -> None:
    """Read a policy by its tensors, on a card that is made to fit them, as a stranger can."""
    sha256 = hashlib.sha256((folder / f"{name}.safetensors").read_bytes()).hexdigest()
    card = {"signals_version": signals.VERSION, "climbs": True, "rho": 0.5, "sha256": sha256}
    (folder / f"{name}.json").write_text(json.dumps(card))
    kind.from_policy(folder)


def _digits(folder: Path) -> None:
    with mock.patch.object(digits, "FILE", folder / "digits.npz"):
        digits._read()


def _ledger(folder: Path) -> None:
    with contextlib.redirect_stderr(io.StringIO()), Ledger(folder) as ledger:
        ledger.rows()


READERS: dict[str, Reader] = {
    "state.pt": _state,
    "checkpoint.pt": lambda folder: checkpoint.load_file(folder / "checkpoint.pt"),
    NEWEST: lambda folder: _resume(folder, forged=True),
    NEWEST.replace(".pt", ".json"): lambda folder: _resume(folder, forged=False),
    "digits.npz": _digits,
    "cifar.tar.gz": lambda folder: cifar10_loader.load(folder / "cifar.tar.gz", subset=100),
    "controller.json": MetaController.from_policy,
    "monitor.json": LossMonitor.from_policy,
    "tensors/controller.safetensors": lambda folder: _policy(folder / "tensors", MetaController, "controller"),
    "tensors/monitor.safetensors": lambda folder: _policy(folder / "tensors", LossMonitor, "monitor"),
    "ablation_results.csv": lambda folder: read_results(folder / "ablation_results.csv"),
    FILE_NAME: _ledger,
    SCALARS: lambda folder: list(read_scalars(folder / SCALARS)),
    "metrics.csv": lambda folder: curves(folder, "loss"),
    "events.jsonl": intervention_steps,
    "shown/result.json": lambda folder: monitor_text(folder / "shown"),
    "flags.json": lambda folder: expand_config(
        ["--config", str(folder / "flags.json")], ("weighting", "seeds", "weights")
    ),
    "run/config.json": lambda folder: _run(folder / "run", "result.json"),
    "run/result.json": lambda folder: _run(folder / "run", "config.json"),
}


def _run(folder: Path, other: str) -> None:
    if not (folder / other).exists():
        (folder / other).write_text(json.dumps(to_json(RunConfig())))
    stored_config(folder)
    finished(Spec("baseline", RunConfig(), folder))


# Mutations ----------------------------------------------------------------------------------------------------

PIECES = (
    *(b"NaN", b"-Infinity", b"1e999", b"9" * 400, b"9" * 5000, b'"', b"\\ud800", b"\0", b"\xff\xfe", b"[" * 50_000),
    *(
        b"null",
        b"{}",
        b"[]",
        b'"x"',
        b"-1",
        b"\r",
        b"\n",
        b",",
        b'=cmd|"/c calc"!A1',
        b"<script>",
        b"../../x",
        b"\x1b]0;x\x07",
    ),
)


def mutated(number: int, seed: int = 0) -> Row:
    """Files with bytes flipped, cut, doubled or put in: read, or refused by an error that is one line to the user."""
    dice, faults = random.Random(seed), []
    originals = _originals()
    places = sorted(originals)
    with tempfile.TemporaryDirectory() as root:
        for trial in range(number):
            place = places[trial % len(places)]
            file = Path(root, place)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(_mutate(originals[place], dice))
            try:
                READERS[place](Path(root))
            except CLEAN:
                continue
            except Exception as error:
                faults.append(f"{place}: {type(error).__name__}")
    return Row("files from strangers: mutated ones are read or refused in one line", number, len(faults), _told(faults))


def _told(faults: list[str]) -> str:
    return ", ".join(f"{fault} {faults.count(fault)}x" for fault in sorted(set(faults)))


def _mutate(content: bytes, dice: random.Random) -> bytes:
    data = bytearray(content)
    for _ in range(dice.randint(1, 3)):
        start = dice.randrange(len(data) + 1)
        end = min(len(data), start + dice.choice((0, 1, 1, 4, 30)))
        match dice.randrange(4):
            case 0:
                data[start:end] = dice.choice(PIECES)
            case 1:
                data[start:end] = bytes(byte ^ (1 << dice.randrange(8)) for byte in data[start:end])
            case 2:
                data[start:start] = data[start:end] * 2
            case _:
                del data[start : end if dice.random() < 0.9 else len(data)]
    return bytes(data)


def _originals() -> dict[str, bytes]:
    """A good file for every reader of text."""
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        for name in ("controller.json", "monitor.json"):
            (folder / name).write_bytes((POLICIES / name).read_bytes())
        (folder / "tensors").mkdir()
        law, network = CLIMB.tensors(), stack([new_network(MonitorConfig())] * 3).state_dict()
        save_file(law, folder / "tensors/controller.safetensors")
        save_file(network, folder / "tensors/monitor.safetensors")
        row = ResultRow("full", 1, "ok", 30, 960, 0.75, 0.5, 0.5, 0, 12, 8.25)
        with Ledger(folder) as ledger:
            ledger.begin(folder / "ablation_results.csv", {"modes": ["full"], "seeds": [1, 2]}, [("full", "b")], {})
            for one in (row, ResultRow.failed("full", 2, "NaN")):
                ledger.add(one)
            ledger.write_results()
        with RunLogger(folder, tensorboard=False) as log:
            for step in (10, 20):
                log.epoch({"epoch": step // 10, "step": step, "loss_ce": 0.5, "weight_ce": 1.0})
                log.event(step, "action", "up")
                log.scalars(step, {"loss/ce": 0.5})
        (folder / "flags.json").write_text(json.dumps({"weighting": "dwa", "seeds": [1, 2], "weights": {"ce": 1.0}}))
        (folder / "run").mkdir()
        (folder / "shown").mkdir()
        told = {"rho": 0.0, "suggestions": {"lower 'kl'": 3}, "residual": {"kl": -0.7}}
        (folder / "shown/result.json").write_text(json.dumps({"monitor": told}))
        (folder / "run/config.json").write_text(json.dumps(to_json(RunConfig())))
        (folder / "run/result.json").write_text(json.dumps(row.as_dict()))
        checkpoint.save_file(folder / "checkpoint.pt", checkpoint.gather({"executor": _executor()}, step=1))
        checkpoint.Checkpoints((folder / NEWEST).parent).save(1, checkpoint.gather({"executor": _executor()}, step=1))
        return {place: (folder / place).read_bytes() for place in READERS if (folder / place).exists()}
