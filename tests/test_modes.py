"""Modes and their registry."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from adaptive_loss import LossExecutor, LossMonitor, MetaController
from adaptive_loss.errors import UsageError
from adaptive_loss.loss_monitor import RandomMonitor
from adaptive_loss.meta_controller import RULE
from adaptive_loss.modes import modes
from adaptive_loss.modes.base import Mode
from adaptive_loss.registry import Registry

WANTED: dict[str, list[type]] = {
    "base_only": [],
    "base_only_all": [],
    "baseline": [],
    "controller_only": [MetaController],
    "full": [MetaController, LossMonitor],
    "lookahead_only": [MetaController],
    "monitor_only": [LossMonitor],
    "random_monitor": [MetaController, RandomMonitor],
}


def test_there_is_a_file_for_every_mode() -> None:
    assert set(modes.names()) >= set(WANTED)


@pytest.mark.parametrize("name", WANTED)
def test_each_builds_its_modulators_anew_each_time(name: str) -> None:
    mode: Mode = modes.get(name)()
    first, second = mode.modulators(None), mode.modulators(None)
    assert [type(m) for m in first] == WANTED[name]
    assert not set(map(id, first)) & set(map(id, second))
    assert mode.base_only == name.startswith("base_only")
    assert mode.all_data == (name == "base_only_all")
    LossExecutor({"a": 1.0, "b": 1.0}, base="a", modulators=first, probe=lambda: pytest.fail("asked too early"))


@pytest.mark.parametrize("name", ["monitor_only", "full", "random_monitor"])
def test_studies_run_the_monitor_at_full_strength(name: str) -> None:
    assert [m.rho for m in modes.get(name)().modulators(None) if isinstance(m, LossMonitor)] == [1.0]


def test_lookahead_only_has_nothing_learned() -> None:
    (controller,) = modes.get("lookahead_only")().modulators(None)
    assert controller.law == RULE


def test_full_adaptive_is_full() -> None:
    assert modes.resolve("full_adaptive") == "full"
    assert modes.get("full_adaptive") is modes.get("full")


@pytest.mark.parametrize("name", ["Full", "base", "", "__init__", "../full"])
def test_an_unknown_mode_is_refused_with_the_choices(name: str) -> None:
    with pytest.raises(UsageError, match="unknown mode") as caught:
        modes.get(name)
    assert all(choice in str(caught.value) for choice in WANTED) and "\n" not in str(caught.value)


def test_a_name_registered_twice_is_refused() -> None:
    registry = Registry("mode", "adaptive_loss.modes", not_plugins=("base",))

    @registry.register("mine")
    def first() -> Mode:
        return Mode()

    registry.register("mine")(first)  # the same object, as on a reload
    with pytest.raises(ValueError, match=r"'mine' is registered twice"):

        @registry.register("mine")
        def second() -> Mode:
            return Mode()

    assert registry.get("mine") is first


def test_a_mode_outside_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_modes.py").write_text(
        "from adaptive_loss.modes.base import Mode\n\ndef shy():\n    return Mode(base_only=True)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        assert modes.get("my_modes:shy")().base_only
        with pytest.raises(UsageError, match="my_modes:bold"):
            modes.get("my_modes:bold")
        with pytest.raises(UsageError, match="no_such_module"):
            modes.get("no_such_module:shy")
    finally:
        sys.modules.pop("my_modes", None)
