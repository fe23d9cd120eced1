"""When to look ahead, and the measurement on the live graph."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from adaptive_loss.gradients import (
    Gradient,
    LookAhead,
    gradients_where_there,
    gramian,
    look_ahead,
    preconditioner,
    term_gradients,
)
from adaptive_loss.parallel import Group, is_split, mean, mean_gradients, size_of, summed

Probe = Callable[[], Tensor]
"""The objective on held-out data, as a differentiable scalar; it draws from its own generator."""


class GraphLost(RuntimeError):
    """The step's graph cannot be kept for a look-ahead (compiled, or its second backward refused)."""


@dataclass(frozen=True)
class Schedule:
    """The steps on which to look ahead: their *number* is fixed, so on long runs their cost vanishes.

    ``early`` of them lie in the first ``early_steps`` steps (a quarter of a shorter run), where wrong weights do their
    damage; ``late`` are spread evenly over the rest. Where the length is unknown, and beyond one that was announced too
    short, they lie at growing distances. A term that comes in mid-run is met like the first ones, by ``early`` more.

    Example:
        >>> schedule = Schedule()
        >>> sum(schedule.due(step, 1000) for step in range(1000)), sum(schedule.due(step, 1000) for step in range(50))
        (32, 12)
    """

    early: int = 12
    late: int = 20
    early_steps: int = 50

    def due(self, step: int, total_steps: int | None, arrived: int = 0) -> bool:
        """Whether ``step`` (from 0) has a look-ahead. Step 0 has none: the optimizer has no metric yet.

        ``arrived`` is the step at which the newest term was there first.
        """
        if step == 0:
            return False
        edge = self.edge(total_steps)
        if 0 < step - arrived <= edge:
            return _is_mark(step - arrived - 1, edge, self.early)
        if total_steps is None or step >= total_steps:
            return math.floor(self.late / 3 * math.log(step)) > math.floor(self.late / 3 * math.log(step - 1))
        return _is_mark(step - edge - 1, total_steps - edge, self.late)

    def edge(self, total_steps: int | None) -> int:
        """The last step of the early part."""
        return self.early_steps if total_steps is None else max(1, min(self.early_steps, total_steps // 4))


def _is_mark(position: int, length: int, count: int) -> bool:
    """Whether ``position`` in 0 … length−1 is one of ``count`` evenly spread ones, the first at 0."""
    return length <= count or (position * count) % length < count


def measure(
    losses: Sequence[Tensor | None],
    weights: Tensor,
    probe: Probe,
    parameters: Sequence[Tensor],
    optimizer: Optimizer | None,
    base: int | None,
    group: Group = None,
) -> LookAhead | None:
    """Look ahead on this step's live graph; None where the probe's value or a gradient is not finite.

    The global random generators are left as they were, so a run with a probe draws what it would draw without. Between
    ranks, losses, objective and gradients are means over all of them.

    Args:
        losses: K live terms, None where absent or off.
        weights: [K] the weights applied this step.
        probe: the objective.
        parameters: the tensors that the optimizer moves.
        optimizer: where the metric comes from; None for the plain one.
        base: index of the base term, or None.
        group: the ranks that train together.

    Raises:
        ValueError: the probe did not return a scalar with a gradient.
        GraphLost: the graph of this step cannot be differentiated twice, or ``fully_shard`` has split the parameters.
    """
    if any(is_split(parameter) for parameter in parameters):
        raise GraphLost("fully_shard has split the parameters")
    with kept_graph(group):
        gradients = gradients_where_there(losses, parameters)
    present = torch.tensor([loss is not None for loss in losses], dtype=torch.float64)
    there = summed(present, group).nonzero().flatten().tolist()
    objective, probe_gradient = _probe_gradient(probe, parameters)
    objective = mean(objective, group)
    rows = [*(gradients[i] for i in there), probe_gradient]
    rows = mean_gradients(rows, parameters, [True] * len(parameters), group)
    # Every rank has all rows; the mean over ranks is there for the last bit alone, which may differ between machines.
    products = summed(gramian(rows, preconditioner(optimizer, parameters)), group) / size_of(group)
    if not (torch.isfinite(products).all() and math.isfinite(objective)):
        return None
    place = None if base is None or base not in there else there.index(base)
    return _spread(look_ahead(products, weights[there], place, objective), there, len(losses))


@contextmanager
def kept_graph(group: Group) -> Iterator[None]:
    """Differentiate in here: what PyTorch refuses, on whatever rank, loses the graph on all of them.

    Raises:
        GraphLost: on every rank.
    """
    refused: RuntimeError | None = None
    try:
        yield
    except RuntimeError as error:
        refused = error
    if mean(float(refused is not None), group):
        raise GraphLost(str(refused or "it was refused on another rank")) from refused


def probe_value(probe: Probe) -> float:
    """The objective's value alone. Gradients stay on, since the objective itself may be made of derivatives."""
    with torch.random.fork_rng(), torch.enable_grad():
        return float(check_objective(probe()).detach())


def check_objective(objective: Tensor) -> Tensor:
    """``objective`` itself, or a ``ValueError`` that says what a probe must return."""
    if not isinstance(objective, Tensor) or objective.dim() != 0 or not objective.requires_grad:
        raise ValueError("probe() must return a 0-dim tensor with a gradient: a loss on held-out data, not detached")
    return objective


def _probe_gradient(probe: Probe, parameters: Sequence[Tensor]) -> tuple[float, Gradient]:
    with torch.random.fork_rng(), torch.enable_grad():
        objective = check_objective(probe())
        return float(objective.detach()), term_gradients([objective], parameters)[0]


def _spread(found: LookAhead, there: list[int], n_terms: int) -> LookAhead:
    def fill(values: Tensor) -> Tensor:
        whole = torch.full((n_terms,), math.nan, dtype=torch.float64)
        whole[there] = values
        return whole

    rows = torch.tensor([*there, n_terms])
    products = torch.full((n_terms + 1, n_terms + 1), math.nan, dtype=torch.float64)
    products[rows[:, None], rows] = found.products
    vectors = (fill(found.gain), fill(found.cos_base), fill(found.cos_probe), fill(found.share))
    return LookAhead(*vectors, found.objective, products)
