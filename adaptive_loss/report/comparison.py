"""Pictures of a comparison: its arms beside each other.

matplotlib is imported on the first picture only.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from adaptive_loss.errors import UsageError
from adaptive_loss.report.pictures import (
    FAINT,
    INK,
    PALETTE,
    Curves,
    colours_of,
    drawing_style,
    literal,
    new_figure,
    panels_for,
    save,
    stack_shares,
    term_shares,
    tidy,
)

Point = tuple[float, float]


def shares_picture(
    losses: Mapping[str, Curves], weights: Mapping[str, Curves], path: str | Path, *, title: str
) -> None:
    """One small panel a run: each term's share |wᵢLᵢ| / Σⱼ|wⱼLⱼ| of the total over the steps, stacked.

    Args:
        losses, weights: by run label, ``step`` and one equally long series a term; of the same runs and terms.
        path: where the picture goes; ``.png``, ``.svg`` or ``.pdf``.
        title: stands above the panels.

    Raises:
        UsageError: nothing to draw, series of unequal length, another suffix.
        RunError: matplotlib is not installed, or the file cannot be written.
    """
    colours = colours_of(losses)
    with drawing_style():
        figure, panels, columns = panels_for(len(losses), title)
        for panel, (label, curves) in zip(panels, losses.items(), strict=False):
            panel.set_title(literal(label))
            stack_shares(panel, list(curves["step"]), term_shares(curves, weights[label]), colours)
        tidy(panels, len(losses), columns, "step", "share of the total")
        save(figure, path)


def samples_picture(images: Mapping[str, Path], path: str | Path, *, title: str) -> None:
    """The PNG file of every run beside those of the others, under its label.

    Raises:
        UsageError: no image, or another suffix.
        RunError: matplotlib is not installed, or the file cannot be written.
    """
    if not images:
        raise UsageError("no images to draw: pass at least one")
    with drawing_style():
        from matplotlib.image import imread

        figure, panels, _ = panels_for(len(images), title)
        for panel, (label, file) in zip(panels, images.items(), strict=False):
            panel.set_title(literal(label))
            panel.imshow(imread(file), cmap="gray")
        for panel in panels:
            panel.set_axis_off()
        save(figure, path)


def plane_picture(
    arms: Mapping[str, Sequence[Point]],
    path: str | Path,
    *,
    title: str,
    axes: tuple[str, str],
    line: Collection[str] = (),
) -> None:
    """A point a run in a plane of two measures, a colour an arm, and a line through the means of the arms in ``line``.

    Args:
        arms: by arm, the (x, y) of its runs.
        path: where the picture goes; ``.png``, ``.svg`` or ``.pdf``.
        title: stands above the picture.
        axes: what x and y are, with their units.
        line: arms that are settings of one knob, joined in the order of x.

    Raises:
        UsageError: no point, or another suffix.
        RunError: matplotlib is not installed, or the file cannot be written.
    """
    if not any(arms.values()):
        raise UsageError("no runs to draw: pass at least one")
    with drawing_style():
        figure = new_figure(6.2, 4.4, title)
        panel = figure.subplots()
        means = sorted((fmean(x for x, _ in arms[arm]), fmean(y for _, y in arms[arm])) for arm in line if arms[arm])
        panel.plot([x for x, _ in means], [y for _, y in means], color=INK, linewidth=0.8)
        for place, (arm, points) in enumerate(arms.items()):
            _points(panel, arm, points, PALETTE[place % len(PALETTE)], "os^Dv"[place // len(PALETTE) % 5])
        panel.grid(color=FAINT, linewidth=0.6)
        panel.set_axisbelow(True)
        panel.set(xlabel=literal(axes[0]), ylabel=literal(axes[1]))
        figure.legend(loc="outside right upper", frameon=False)
        save(figure, path)


def _points(panel: Any, arm: str, points: Sequence[Point], colour: str, marker: str) -> None:
    x, y = [x for x, _ in points], [y for _, y in points]
    panel.scatter(x, y, s=26, color=colour, marker=marker, label=literal(arm), alpha=0.85)
