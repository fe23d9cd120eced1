"""TensorBoard: the logs are the truth, and its files rebuilt from them hold the same scalars as those written live."""

from __future__ import annotations

import os
import random
import tempfile
from pathlib import Path

from adaptive_loss.rebuild import curves, read_scalars
from adaptive_loss.utils.logging import SCALARS, RunLogger
from tests.reliability.rows import Row

Scalars = dict[str, list[tuple[int, float]]]


def torture(runs: int = 200) -> Row:
    """200 runs with extreme values and hostile names, every third of them cut off and resumed."""
    return rebuilt(runs)


def rebuilt(runs: int, seed: int = 0) -> Row:
    """Write ``runs`` runs, rebuild the TensorBoard files of each, and compare every scalar."""
    dice, compared, different = random.Random(seed), 0, 0
    for number in range(runs):
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder)
            if number % 3 == 2:
                _resumed(run, dice)
            else:
                _whole(run, dice, 60)
            live = shown(run / "tb")
            if number % 2:
                _spoil(run / "tb", dice)
            again = shown(curves(run))
            compared += sum(map(len, live.values()))
            different += live != again or sum(map(len, live.values())) != _logged(run)
    return Row("TensorBoard rebuilt from the logs: the same scalars", compared, different, f"scalars of {runs} runs")


def shown(folder: Path) -> Scalars:
    """Tag → steps and values, as TensorBoard reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    files = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    files.Reload()
    return {tag: [(e.step, e.value) for e in files.Scalars(tag)] for tag in files.Tags()["scalars"]}


def _logged(run: Path) -> int:
    return sum(len(values) for _, values in read_scalars(run / SCALARS))


def _values(dice: random.Random) -> dict[str, float]:
    names = ("loss/ce", "weight/<script>", "share/=cmd", "loss/\x1b[31m", "größe", "a b")
    values = (dice.gauss(0, 1), 1e-45, 3e38, -0.0, 2**-149, 1 / 3, float("nan"), float("inf"))
    return {name: dice.choice(values) for name in names}


def _whole(run: Path, dice: random.Random, steps: int) -> None:
    with RunLogger(run) as log:
        _log(log, dice, range(10, 10 * steps, 10))


def _log(log: RunLogger, dice: random.Random, steps: range) -> None:
    for step in steps:
        log.scalars(step, _values(dice))


def _resumed(run: Path, dice: random.Random) -> None:
    """A run that was killed after the checkpoint at step 300, amid a record of a later step, and resumed from it."""
    with RunLogger(run) as log:
        for step in range(10, 500, 10):
            log.scalars(step, _values(dice))
            if step == 300:
                saved = log.state_dict()
                (file,) = (run / "tb").glob("events.out.tfevents.*")
                flushed = file.stat().st_size
    os.truncate(file, dice.randint(flushed, file.stat().st_size))
    with RunLogger(run) as log:
        log.load_state_dict(saved)
        for step in range(310, 600, 10):
            log.scalars(step, _values(dice))


def _spoil(folder: Path, dice: random.Random) -> None:
    """What TensorBoard's files do not survive: a flipped byte, or that they are gone."""
    for file in folder.glob("events.out.tfevents.*"):
        content = bytearray(file.read_bytes())
        content[dice.randrange(len(content))] ^= 0xFF
        file.write_bytes(content)
        if dice.random() < 0.5:
            file.unlink()
