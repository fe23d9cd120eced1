"""The pictures: files of the right kind, names shown literally, mistakes told in one line."""

from __future__ import annotations

import itertools
import math
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from adaptive_loss.errors import RunError, UsageError
from adaptive_loss.report import pictures
from adaptive_loss.report.pictures import losses_and_shares, term_shares, weights_picture

matplotlib = pytest.importorskip("matplotlib")

STEPS = [0, 10, 20, 30]
RUN = {"step": STEPS, "ce": [1.0, 1.0, 1.0, 1.0], "kl": [10.0, 3.0, 1.0, 0.8]}


def test_png_and_svg(tmp_path: Path) -> None:
    runs = {f"full, seed {seed}": RUN for seed in range(4)}
    weights_picture(runs, tmp_path / "w.png", title="Weights", interventions={"full, seed 1": [10, 20]})
    assert (tmp_path / "w.png").read_bytes().startswith(b"\x89PNG")
    losses_and_shares(RUN, RUN, tmp_path / "l.svg", title="Losses", interventions=[10])
    assert ElementTree.parse(tmp_path / "l.svg").getroot().tag.endswith("svg")


def test_the_same_data_give_the_same_file(tmp_path: Path) -> None:
    for name in ("a.svg", "b.svg"):
        weights_picture({"full": RUN}, tmp_path / name, title="Weights")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_the_callers_matplotlib_is_left_alone(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    weights_picture({"full": RUN}, tmp_path / "w.svg", title="Weights")
    assert dict(matplotlib.rcParams) == before
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def test_names_are_shown_literally_and_harm_nothing(tmp_path: Path) -> None:
    name = "<script>alert(1)</script>$\\frac{--> "
    runs = {name + "\n": {"step": STEPS, name: RUN["kl"], "_hidden": RUN["ce"], "$x": RUN["ce"]}}
    weights_picture(runs, tmp_path / "w.svg", title=name)
    tags = {element.tag for element in ElementTree.parse(tmp_path / "w.svg").iter()}
    assert not any("script" in str(tag).lower() for tag in tags)
    assert "http-equiv" not in (tmp_path / "w.svg").read_text()


def test_degenerate_series(tmp_path: Path) -> None:
    point = {"step": [3], "ce": [1.0]}
    invalid = {"step": [0, 1], "ce": [0.0, math.nan], "kl": [-1.0, math.inf]}
    many = {"step": [0, 1], **{f"term {n}": [1.0, 10.0**-n] for n in range(15)}}
    weights_picture({"point": point, "invalid": invalid, "many": many}, tmp_path / "w.svg", title="Weights")
    for curves in (point, invalid):
        losses_and_shares(curves, curves, tmp_path / "l.svg", title="Losses")


def test_shares_add_up_to_one() -> None:
    shares = term_shares({"step": [0, 1], "a": [1, -2], "b": [3, 2]}, {"step": [0, 1], "a": [3, 1], "b": [1, 1]})
    assert shares == {"a": [0.5, 0.5], "b": [0.5, 0.5]}
    assert term_shares({"step": [0], "a": [math.nan]}, {"step": [0], "a": [1.0]}) == {"a": [0.0]}


def test_labels_keep_apart_and_in_order() -> None:
    heights = pictures._spread({"a": 0.5, "b": 0.51, "c": 0.52, "d": 0.99, "e": 1.0, "f": 0.0}, 0.1)
    ordered = [heights[name] for name in ("f", "a", "b", "c", "d", "e")]
    assert all(high - low >= 0.1 - 1e-12 for low, high in itertools.pairwise(ordered))
    assert heights["b"] == pytest.approx(0.51)  # a group stands around its middle
    assert ordered[0] >= 0
    assert ordered[-1] <= 1


def test_mistakes_are_told(tmp_path: Path) -> None:
    file = tmp_path / "w.png"
    for runs, told in (
        ({}, "no runs"),
        ({"full": {"ce": [1.0]}}, "nothing to draw"),
        ({"full": {"step": [], "ce": []}}, "nothing to draw"),
        ({"full": {"step": [0, 1], "ce": [1.0]}}, "1 values, 2 steps"),
    ):
        with pytest.raises(UsageError, match=told):
            weights_picture(runs, file, title="Weights")
    with pytest.raises(UsageError, match=r"pictures end in .png, .svg, .pdf"):
        weights_picture({"full": RUN}, tmp_path / "w.gif", title="Weights")
    with pytest.raises(UsageError, match="differ in their terms"):
        losses_and_shares(RUN, {"step": STEPS, "ce": RUN["ce"]}, file, title="Losses")
    assert not file.exists()


def test_without_matplotlib_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(RunError, match=r"pip install 'adaptive-loss\[report\]'"):
        weights_picture({"full": RUN}, tmp_path / "w.png", title="Weights")
