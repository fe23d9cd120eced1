"""Requests to stop, by signal, by file and by the death of the study, and when a run is saved."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from adaptive_loss.checkpoint import Checkpoints, gather
from adaptive_loss.errors import Stopped
from adaptive_loss.trainer import keeping
from adaptive_loss.trainer.keeping import Keeper
from adaptive_loss.trainer.stopping import Lead, StopRequest
from adaptive_loss.utils.commands import command

ROOT = Path(__file__).parents[1]


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def handlers() -> list[Any]:
    return [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_is_a_request_and_the_handlers_are_put_back(number: signal.Signals, code: int) -> None:
    before = handlers()
    with StopRequest() as stop:
        assert stop.asked() is None
        send(number)
        request = stop.asked()
    assert request is not None and (str(request), request.code) == (f"stopped by {number.name}", code)
    assert handlers() == before


def test_a_second_signal_leaves_at_once() -> None:
    code = (
        "import os, signal\n"
        "from adaptive_loss.trainer.stopping import StopRequest\n"
        "with StopRequest():\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('still here')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (143, "")


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            send(signal.SIGINT)
            assert stop.asked() is None
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_another_thread_takes_no_signals_but_sees_files(tmp_path: Path) -> None:
    before, found = handlers(), []

    def work() -> None:
        with StopRequest([tmp_path]) as stop:
            found.append((handlers(), stop.asked()))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found[0][0] == before and found[0][1] is not None


def test_a_file_is_a_request_as_soon_as_it_is_there(tmp_path: Path) -> None:
    with StopRequest([tmp_path / "no", tmp_path / "leave"]) as stop:
        assert stop.asked() is None
        (tmp_path / "leave").touch()
        request = stop.asked()
    assert request is not None and (str(request), request.code) == (
        f"stopped because {tmp_path / 'leave'} is there",
        143,
    )


def test_a_signal_is_told_to_others_by_a_file(tmp_path: Path) -> None:
    lead = Lead(os.getppid(), tmp_path / "stop")
    with StopRequest(tell=lead.file), StopRequest(lead=lead) as worker:
        assert worker.asked() is None
    with StopRequest(tell=lead.file):
        send(signal.SIGTERM)
    assert StopRequest(lead=lead).asked() is not None


def test_a_worker_whose_study_has_died_stops(tmp_path: Path) -> None:
    request = StopRequest(lead=Lead(os.getppid() + 1, tmp_path / "stop")).asked()
    assert request is not None and "the study has died" in str(request)


def saved_steps(tmp_path: Path, every: str, steps: int, stop: StopRequest | None = None) -> list[int]:
    """The steps after which a run of so many would be saved."""
    steps_saved: list[int] = []

    class Noting(Checkpoints):
        def save(self, step: int, state: Any) -> None:
            steps_saved.append(step)

    keeper = Keeper(Noting(tmp_path), every, stop or StopRequest())
    for step in range(1, steps + 1):
        keeper.between_steps(step, lambda: gather({}))
    return steps_saved


def test_saves_every_so_many_steps(tmp_path: Path) -> None:
    assert saved_steps(tmp_path, "4", 13) == [4, 8, 12]


def test_saves_every_so_many_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1000, 2))
    monkeypatch.setattr(keeping.time, "monotonic", lambda: next(clock))
    # The clock is looked at once a step, and once more where a save ends.
    assert saved_steps(tmp_path, "6s", 12) == [3, 6, 9, 12]


def test_a_request_saves_and_is_raised(tmp_path: Path) -> None:
    (tmp_path / "leave").touch()
    keeper = Keeper(Checkpoints(tmp_path / "kept"), "1000", StopRequest([tmp_path / "leave"]))
    with pytest.raises(Stopped):
        keeper.between_steps(3, lambda: gather({}, step=3))
    saved = Checkpoints(tmp_path / "kept").load()
    assert saved is not None and saved["counters"] == {"step": 3}


def test_a_command_that_is_terminated_closes_what_it_has_open(capsys: pytest.CaptureFixture[str]) -> None:
    closed = []

    @command
    def main(argv: Any = None) -> int:
        try:
            send(signal.SIGTERM)
        finally:
            closed.append(True)
        return 0

    assert main() == 143 and closed
    assert capsys.readouterr().err == "error: stopped by SIGTERM; run the same command again to go on\n"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
