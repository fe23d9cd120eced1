"""Pictures of what the weights did: PNG, SVG or PDF by the file's suffix, drawn without a display.

matplotlib is imported on the first picture only.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adaptive_loss.errors import RunError, UsageError
from adaptive_loss.records import write_atomic
from adaptive_loss.trainer.simple_ablation_analysis import printable

Curves = Mapping[str, Sequence[float]]

# Okabe & Ito's palette, told apart with every common colour blindness; black and yellow left out as lines
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6A51A3", "#7F7F7F")
INK, FAINT = "#333333", "#D9D9D9"
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "font.family": "DejaVu Sans",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "svg.hashsalt": "adaptive-loss",  # with no date in it, the same data give the same file
}
SUFFIXES = (".png", ".svg", ".pdf")


def weights_picture(
    runs: Mapping[str, Curves],
    path: str | Path,
    *,
    title: str,
    interventions: Mapping[str, Sequence[float]] | None = None,
) -> None:
    """One small panel a run: the weight of each term over the steps, on a log axis shared by all panels.

    Args:
        runs: by run label, ``step`` and one equally long series of weights a term.
        path: where the picture goes; ``.png``, ``.svg`` or ``.pdf``.
        title: stands above the panels.
        interventions: by run label, the steps at which a component acted: ticks at the panel's foot.

    Raises:
        UsageError: nothing to draw, series of unequal length, another suffix.
        RunError: matplotlib is not installed, or the file cannot be written.

    Example:
        >>> import tempfile
        >>> runs = {"full, seed 1": {"step": [0, 1, 2], "ce": [1, 1, 1], "kl": [1, 0.3, 0.1]}}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     weights_picture(runs, f"{folder}/weights.svg", title="Weights")
        ...     (Path(folder) / "weights.svg").exists()
        True
    """
    colours = colours_of(runs)
    with drawing_style():
        figure, panels, columns = panels_for(len(runs), title)
        for panel, (label, curves) in zip(panels, runs.items(), strict=False):
            panel.set_title(literal(label))
            _log_lines(panel, curves, colours)
            _ticks(panel, (interventions or {}).get(label, ()))
        _label_ends(panels[: len(runs)], list(runs.values()), colours)
        tidy(panels, len(runs), columns, "step (ticks: interventions)" if interventions else "step", "weight")
        save(figure, path)


def losses_and_shares(
    losses: Curves, weights: Curves, path: str | Path, *, title: str, interventions: Sequence[float] = ()
) -> None:
    """Above, each term's loss on a log axis; below, each term's share |wᵢLᵢ| / Σⱼ|wⱼLⱼ| of the total, stacked.

    Args:
        losses: ``step`` and one series a term, before weighting.
        weights: ``step`` and the weights of the same terms at the same steps.
        path: where the picture goes; ``.png``, ``.svg`` or ``.pdf``.
        title: stands above both panels.
        interventions: the steps at which a component acted.

    Raises:
        UsageError: nothing to draw, terms or lengths that differ, another suffix.
        RunError: matplotlib is not installed, or the file cannot be written.
    """
    colours = colours_of({"losses": losses, "weights": weights})
    if set(losses) != set(weights) or len(losses["step"]) != len(weights["step"]):
        raise UsageError("losses and weights differ in their terms or steps; pass both of the same run")
    with drawing_style():
        figure = new_figure(7.2, 5.6, title)
        above, below = figure.subplots(2, 1, sharex=True)
        _log_lines(above, losses, colours)
        _label_ends([above], [losses], colours)
        above.set_ylabel("loss")
        shares = term_shares(losses, weights)
        steps = list(losses["step"])
        stack_shares(below, steps, shares, colours)
        below.set_ylabel("share of the total")
        below.set_xlabel("step (ticks: interventions)" if len(interventions) else "step")
        for panel in (above, below):
            _ticks(panel, interventions)
        save(figure, path)


def term_shares(losses: Curves, weights: Curves) -> dict[str, list[float]]:
    """Each term's share |wᵢLᵢ| / Σⱼ|wⱼLⱼ| at each step; a non-finite part counts as 0.

    Example:
        >>> term_shares({"step": [0], "a": [1.0], "b": [2.0]}, {"step": [0], "a": [2.0], "b": [3.0]})
        {'a': [0.25], 'b': [0.75]}
    """
    parts = {
        term: [abs(w * x) if math.isfinite(w * x) else 0.0 for w, x in zip(weights[term], losses[term], strict=True)]
        for term in _terms(losses)
    }
    totals = [sum(step) or 1.0 for step in zip(*parts.values(), strict=True)]
    return {term: [part / total for part, total in zip(series, totals, strict=True)] for term, series in parts.items()}


def stack_shares(panel: Any, steps: Sequence[float], shares: Curves, colours: Mapping[str, str]) -> None:
    """Shares that add up to 1, stacked over the steps and named at their end; those of a single step as a bar."""
    ends = list(steps) if len(steps) > 1 else [steps[0], _end(steps)]
    areas = [series if len(steps) > 1 else [series[0], series[0]] for series in shares.values()]
    panel.stackplot(ends, *areas, colors=[colours[t] for t in shares], edgecolor="white", linewidth=0.6)
    _label_shares(panel, shares, colours)
    panel.set(ylim=(0, 1), xlim=(steps[0], _end(steps)))
    panel.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}%")


def _terms(curves: Curves) -> list[str]:
    return [name for name in curves if name != "step"]


def colours_of(runs: Mapping[str, Curves]) -> dict[str, str]:
    """One colour a term, the same in every panel; checks the series on the way."""
    for label, curves in runs.items():
        if "step" not in curves or not len(curves["step"]) or not _terms(curves):
            raise UsageError(f"run {label!r} has nothing to draw: pass 'step' and at least one term, not empty")
        for term in _terms(curves):
            if len(curves[term]) != len(curves["step"]):
                raise UsageError(f"run {label!r}: {term!r} has {len(curves[term])} values, {len(curves['step'])} steps")
    if not runs:
        raise UsageError("no runs to draw: pass at least one")
    terms = dict.fromkeys(term for curves in runs.values() for term in _terms(curves))
    return {term: PALETTE[place % len(PALETTE)] for place, term in enumerate(terms)}


def drawing_style() -> Any:
    """A context in which pictures have our style; :class:`RunError` says how to get matplotlib."""
    try:
        import matplotlib
    except ImportError as error:
        raise RunError("pictures need matplotlib: pip install 'adaptive-loss[report]'") from error
    return matplotlib.rc_context(STYLE)


def new_figure(width: float, height: float, title: str) -> Any:
    """An empty figure, sizes in inches."""
    # a bare Figure needs no display and leaves the caller's pyplot state alone
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", dpi=150)
    figure.suptitle(literal(title), x=0.01, ha="left", fontsize=12, fontweight="bold")
    return figure


def panels_for(count: int, title: str) -> tuple[Any, list[Any], int]:
    """A figure, its panels of which the first ``count`` are wanted, and how many stand in a row; they share their y."""
    columns = {1: 1, 2: 2, 4: 2}.get(count, 3)
    lines = math.ceil(count / columns)
    figure = new_figure(4.1 * columns + 0.4, 2.5 * lines + 0.7, title)
    return figure, list(figure.subplots(lines, columns, sharey=True, squeeze=False).flat), columns


def literal(name: object) -> str:
    """A name as matplotlib shows it literally: no mathematics between dollars, no control characters."""
    return printable(name).replace("$", r"\$")


def _end(steps: Sequence[float]) -> float:
    return steps[-1] if steps[-1] > steps[0] else steps[0] + 1


def _log_lines(panel: Any, curves: Curves, colours: Mapping[str, str]) -> None:
    from matplotlib.ticker import FuncFormatter

    panel.set_yscale("log")
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.grid(axis="y", color=FAINT, linewidth=0.6)
    panel.set_axisbelow(True)
    single = len(curves["step"]) == 1
    for term in _terms(curves):
        values = [v if math.isfinite(v) and v > 0 else math.nan for v in curves[term]]  # a gap, not a wrong point
        panel.plot(curves["step"], values, color=colours[term], linewidth=1.6, marker="o" if single else None)
    panel.set_xlim(curves["step"][0], _end(curves["step"]))


def _ticks(panel: Any, steps: Sequence[float]) -> None:
    """Interventions as short ticks along the foot: they show when, and hide no curve."""
    if len(steps):
        panel.vlines(list(steps), 0, 0.04, transform=panel.get_xaxis_transform(), color=INK, linewidth=0.7, alpha=0.6)


def _label_ends(panels: Sequence[Any], curves: Sequence[Curves], colours: Mapping[str, str]) -> None:
    """Each term's name at its line's end, pushed apart just enough to be read."""
    _widen(panels[0])
    for panel, own in zip(panels, curves, strict=True):
        low, high = (math.log10(edge) for edge in panel.get_ylim())
        ends = {term: _last(own[term]) for term in _terms(own)}
        wanted = {t: (math.log10(end) - low) / (high - low) for t, end in ends.items() if end is not None}
        for term, height in _spread(wanted, 0.085).items():
            _name(panel, term, height, colours[term])


def _widen(panel: Any) -> None:
    """At least a decade, so that a constant weight looks constant and the axis has a labelled tick."""
    low, high = panel.get_ylim()
    if high < 10 * low:
        middle = math.sqrt(low * high)
        panel.set_ylim(middle / math.sqrt(10), middle * math.sqrt(10))


def _label_shares(panel: Any, shares: Curves, colours: Mapping[str, str]) -> None:
    wanted: dict[str, float] = {}
    floor = 0.0
    for term, series in shares.items():
        wanted[term] = floor + series[-1] / 2
        floor += series[-1]
    for term, height in _spread(wanted, 0.085).items():
        _name(panel, term, height, colours[term])


def _name(panel: Any, term: str, height: float, colour: str) -> None:
    short = term if len(term) <= 18 else term[:17] + "…"
    place = {"xycoords": "axes fraction", "textcoords": "offset points", "xytext": (5, 0), "va": "center"}
    panel.annotate(literal(short), (1.0, height), color=colour, fontsize=8.5, annotation_clip=False, **place)


def _last(series: Sequence[float]) -> float | None:
    return next((v for v in reversed(list(series)) if math.isfinite(v) and v > 0), None)


def _spread(wanted: Mapping[str, float], gap: float) -> dict[str, float]:
    """Heights at least ``gap`` apart in the order wanted: names that collide stand around their common middle."""
    groups: list[tuple[list[str], float]] = []
    for name in sorted(wanted, key=lambda name: wanted[name]):
        group, middle = [name], wanted[name]
        while groups and middle - groups[-1][1] < gap * (len(group) + len(groups[-1][0])) / 2:
            below, _ = groups.pop()
            group = below + group
            middle = sum(wanted[member] for member in group) / len(group)
        half = gap * (len(group) - 1) / 2
        groups.append((group, max(min(middle, 1.0 - half), half)))
    return {
        name: middle + gap * (place - (len(group) - 1) / 2)
        for group, middle in groups
        for place, name in enumerate(group)
    }


def tidy(panels: Sequence[Any], used: int, columns: int, xlabel: str, ylabel: str) -> None:
    """Name the outer axes of the panels that are used, and hide the others."""
    for place, panel in enumerate(panels):
        if place >= used:
            panel.set_visible(False)
        if place % columns == 0:
            panel.set_ylabel(ylabel)
        if place + columns >= used:  # the lowest drawn panel of its column
            panel.set_xlabel(xlabel)
            panel.tick_params(labelbottom=True)


def save(figure: Any, path: str | Path) -> None:
    """Write the figure as what the suffix of ``path`` says; :class:`UsageError` where it says nothing we know."""
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise UsageError(f"{path}: pictures end in {', '.join(SUFFIXES)}")
    buffer = io.BytesIO()
    metadata = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(suffix, {})
    figure.savefig(buffer, format=suffix[1:], metadata=metadata)
    write_atomic(path, buffer.getvalue())
