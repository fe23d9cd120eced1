"""Policies on disk: what is written comes back, and everything else is refused in one line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from adaptive_loss import policy_files, signals
from adaptive_loss.errors import RunError
from adaptive_loss.policy_files import LARGEST_CARD, POLICIES, check_like, read_policy, refusing, write_policy

CARD: dict[str, Any] = {"families": ["vae"], "seeds": [1, 2], "evidence": {"gain": 0.1}, "made_by": "a command"}
TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(1.5, dtype=torch.float64)}


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    write_policy(tmp_path / "new" / "folder", "mine", {**TENSORS, "c": torch.eye(3).T[::2]}, {**CARD, "rho": 0.25})
    card, tensors = read_policy(tmp_path / "new" / "folder", "mine")
    assert card | CARD == card and card["rho"] == 0.25 and card["signals_version"] == signals.VERSION
    assert card["versions"]["torch"] == torch.__version__
    for name, tensor in TENSORS.items():
        assert torch.equal(tensors[name], tensor) and tensors[name].dtype == tensor.dtype
    assert card["sha256"] == hashlib.sha256((tmp_path / "new/folder/mine.safetensors").read_bytes()).hexdigest()


def test_the_same_policy_is_the_same_bytes(tmp_path: Path) -> None:
    for name in "ab":
        write_policy(tmp_path / name, "mine", TENSORS, CARD)
    for file in ("mine.json", "mine.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_a_card_may_stand_alone_and_then_no_tensors_are_left(tmp_path: Path) -> None:
    write_policy(tmp_path, "mine", TENSORS, CARD)
    write_policy(tmp_path, "mine", {}, CARD)
    card, tensors = read_policy(tmp_path, "mine")
    assert "sha256" not in card and tensors == {} and not (tmp_path / "mine.safetensors").exists()


@pytest.mark.parametrize("missing", policy_files.TOLD)
def test_a_card_that_tells_too_little_is_not_written(tmp_path: Path, missing: str) -> None:
    with pytest.raises(ValueError, match=f"says nothing of '{missing}'"):
        write_policy(tmp_path, "mine", TENSORS, {name: value for name, value in CARD.items() if name != missing})
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_one_error_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="cannot be written"):
        write_policy(tmp_path / "file", "mine", TENSORS, CARD)


def test_a_kill_between_tensors_and_card_leaves_a_policy_that_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_policy(tmp_path, "mine", TENSORS, CARD)
    write = policy_files.write_atomic

    def killed(file: Path, content: str | bytes) -> None:
        if file.suffix == ".json":
            raise KeyboardInterrupt
        write(file, content)

    monkeypatch.setattr(policy_files, "write_atomic", killed)
    with pytest.raises(KeyboardInterrupt):
        write_policy(tmp_path, "mine", {"a": torch.ones(1)}, CARD)
    with pytest.raises(ValueError, match="sha256 is not the one on its card"):
        read_policy(tmp_path, "mine")


def card_says(folder: Path, **changes: object) -> None:
    file = folder / "mine.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def forged(folder: Path, content: bytes) -> None:
    """Other tensors, with their hash on the card."""
    (folder / "mine.safetensors").write_bytes(content)
    card_says(folder, sha256=hashlib.sha256(content).hexdigest())


def content(tensors: dict[str, Tensor], folder: Path) -> bytes:
    save_file(tensors, folder / "other")
    return (folder / "other").read_bytes()


DAMAGE: dict[str, Callable[[Path], object]] = {
    "no card": lambda p: (p / "mine.json").unlink(),
    "a folder in its place": lambda p: ((p / "mine.json").unlink(), (p / "mine.json").mkdir()),
    "half a card": lambda p: (p / "mine.json").write_text('{"signals_version": 1'),
    "a card too large": lambda p: (p / "mine.json").write_text(" " * (LARGEST_CARD + 1)),
    "no text": lambda p: (p / "mine.json").write_bytes(b"\xff\xfe\x00" * 99),
    "a number": lambda p: (p / "mine.json").write_text("3"),
    "no version": lambda p: (p / "mine.json").write_text("{}"),
    "no tensors": lambda p: (p / "mine.safetensors").unlink(),
    "other tensors": lambda p: save_file({"a": torch.ones(2)}, p / "mine.safetensors"),
    "tensors that the card does not tell": lambda p: card_says(p, sha256=None),
    "a hash that is none": lambda p: card_says(p, sha256=[3]),
    "truncated tensors": lambda p: forged(p, (p / "mine.safetensors").read_bytes()[:-1]),
    "a header that lies": lambda p: forged(p, b"\xff" * 100),
    "a pickle": lambda p: forged(p, b"\x80\x04\x95\x00"),
    "NaN": lambda p: forged(p, content({"a": torch.tensor([1.0, torch.nan])}, p)),
    "infinity": lambda p: forged(p, content({"a": torch.tensor(-torch.inf)}, p)),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_refused_in_one_line_that_names_the_file(tmp_path: Path, what: str) -> None:
    write_policy(tmp_path, "mine", TENSORS, CARD)
    DAMAGE[what](tmp_path)
    with pytest.raises(ValueError, match=r"cannot read the policy .*mine\.(json|safetensors): ") as caught:
        read_policy(tmp_path, "mine")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400 + len(str(tmp_path))


def test_too_large_tensors_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_policy(tmp_path, "mine", TENSORS, CARD)
    monkeypatch.setattr(policy_files, "LARGEST_TENSORS", (tmp_path / "mine.safetensors").stat().st_size - 1)
    with pytest.raises(ValueError, match="it has more than"):
        read_policy(tmp_path, "mine")


def test_other_signals_say_so_whatever_else_is_there(tmp_path: Path) -> None:
    write_policy(tmp_path, "mine", TENSORS, {**CARD, "signals_version": 99})
    (tmp_path / "mine.safetensors").unlink()
    with pytest.raises(ValueError, match=rf"was made for signals version 99, this is {signals.VERSION}: train it anew"):
        read_policy(tmp_path, "mine")


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"a": torch.zeros(2)}, "lacks tensor 'b'"),
        ({"a": torch.zeros(2), "b": torch.zeros(()), "c": torch.zeros(())}, "foreign tensor 'c'"),
        ({"a": torch.zeros(3), "b": torch.zeros(())}, "'a' is torch.float32 [3], not torch.float32 [2]"),
        ({"a": torch.zeros(2), "b": torch.zeros(()).double()}, "'b' is torch.float64 [], not torch.float32 []"),
    ],
)
def test_tensors_unlike_those_wanted_are_refused(tensors: dict[str, Tensor], says: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        check_like(tensors, {"a": torch.zeros(2), "b": torch.zeros(())})
    assert says in str(caught.value)


def test_a_fault_of_the_program_s_own_is_no_refusal(tmp_path: Path) -> None:
    with pytest.raises(AssertionError), refusing(tmp_path / "mine.json"):
        raise AssertionError


@pytest.mark.parametrize("name", ["controller", "monitor"])
def test_the_shipped_cards_tell_what_every_card_must(name: str) -> None:
    card, _ = read_policy(POLICIES, name)
    assert not {*policy_files.TOLD, "versions"} - set(card)
