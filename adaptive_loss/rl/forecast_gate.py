"""The gate behind the monitor: it closes where held-out losses turn out worse than their own trend foretold."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from adaptive_loss.events import Event

WINDOW, LEAST = 12, 6
"""Epochs that a forecast looks back on at most, and at least."""
WIDTH = 4.0
"""Spreads that a value may lie above its forecast."""
FLOOR = 0.01
"""Least spread, in nats: losses that hardly scatter may rise by some per cent before anyone is blamed."""
COUNTS, FORGIVEN = 3.0, 0.5
"""Epochs above the band that close the gate, and what every other epoch takes off their count."""
LAST = 1 / 16
"""Share of ρ that is halved no more but becomes 0."""


def line(history: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Slope and height at 0 of the Theil–Sen line: b = median (yⱼ − yᵢ)/(j − i), a = median (yᵢ − b·i).

    Up to 29% of the values, however far out, leave it about where it is.

    Args:
        history: (i, yᵢ), at least two of them, at different i.

    Example:
        >>> line([(0, 1.0), (1, 2.0), (2, 3.0), (3, 40.0), (4, 5.0)])
        (1.0, 1.0)
    """
    slope = median((y - x) / (j - i) for (i, x), (j, y) in itertools.combinations(history, 2))
    return slope, median(y - slope * i for i, y in history)


def highest(history: Sequence[tuple[int, float]], epoch: int) -> tuple[float, float]:
    """What ŷ is expected at ``epoch``, and the highest value that the scatter explains, ŷ + 4σ.

    With a + b·i the line through the last n ≤ 12 values, ŷ = max(a + b·epoch, median of the last three values): an
    improvement that slows down, or ends, is no harm; nor is a jump that the trend soon makes good.
    σ = 1.4826·median |yᵢ − a − b·i|·n/(n − 2), at least 0.01: the standard deviation of the scatter, were it Gaussian,
    for the two numbers that the line has taken from it.

    Args:
        history: (i, yᵢ), yᵢ the log of the loss after epoch i.
        epoch: the one that is looked at, later than all of the history.
    """
    seen = history[-WINDOW:]
    slope, start = line(seen)
    scatter = 1.4826 * median(abs(y - start - slope * i) for i, y in seen) * len(seen) / (len(seen) - 2)
    expected = max(start + slope * epoch, median(y for _, y in seen[-3:]))
    return expected, expected + WIDTH * max(scatter, FLOOR)


def _loss(log: float) -> float:
    return math.exp(min(log, 700.0))


class ForecastGate:
    """Says how much of ρ is left: 1 at first, halved to 0 once the monitor looks to do harm, and never more again.

    An epoch counts where its loss lies above :func:`highest` while the monitor's residual is applied and not 0; it is
    then no part of later forecasts. Every other epoch takes half a count off. At 3 counts the share left is halved, and
    at every further epoch again, until below 1/16 it is 0 and the monitor goes on in shadow.

    Attributes:
        share: what is left of ρ, in [0, 1].

    Example:
        >>> gate = ForecastGate()
        >>> losses = [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 2.0, 2.0, 2.0]
        >>> [event.step for epoch, loss in enumerate(losses) for event in gate.observe(epoch, loss, acting=True)]
        [8]
        >>> gate.share
        0.5
    """

    def __init__(self) -> None:
        self.share, self.count, self.epoch = 1.0, 0.0, 0
        self.history: list[tuple[int, float]] = []

    def observe(self, step: int, loss: float, acting: bool) -> list[Event]:
        """Take in one epoch's loss.

        Args:
            step: of the event, where there is one.
            loss: on held-out data, lower is better; one that is not finite or not above 0 says nothing here.
            acting: whether the residual is applied and not 0.
        """
        if self.share < 1:
            return self._close(step)
        if not (math.isfinite(loss) and loss > 0):
            return []
        self.epoch += 1
        value, known = math.log(loss), len(self.history) >= LEAST
        expected, limit = highest(self.history, self.epoch) if known else (value, value)
        if not (acting and value > limit):
            self.count = max(0.0, self.count - FORGIVEN)
            self.history = [*self.history[1 - WINDOW :], (self.epoch, value)]
            return []
        self.count += 1
        if self.count < COUNTS:
            return []
        self.share = 0.5
        numbers = {"loss": loss, "expected": _loss(expected), "highest": _loss(limit), "share": self.share}
        why = f"held-out loss {loss:.4g} where its trend expects {numbers['expected']:.4g}"
        return [Event(step, "gate", f"{why}, at most {numbers['highest']:.4g}: rho is halved, and so on to 0", numbers)]

    def _close(self, step: int) -> list[Event]:
        if not self.share:
            return []
        self.share = 0.0 if self.share <= LAST else self.share / 2
        return [] if self.share else [Event(step, "gate", "rho is 0: the monitor goes on in shadow", {"share": 0.0})]

    def state_dict(self) -> dict[str, Any]:
        """Everything, as numbers."""
        return {**vars(self), "history": [list(seen) for seen in self.history]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self.share, self.count, self.epoch = state["share"], state["count"], state["epoch"]
        self.history = [(epoch, value) for epoch, value in state["history"]]
