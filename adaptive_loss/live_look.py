"""A look-ahead for a step whose optimizer is not known yet, as on the first step after a restart."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from adaptive_loss.gradients import Gradient, LookAhead, leaves, term_gradients
from adaptive_loss.lookahead import GraphLost, Probe, check_objective, measure

MeasureLater = Callable[[Sequence[Tensor], Optimizer], LookAhead | None]
"""The parameters the optimizer moves, and the optimizer → what the look-ahead found."""


def measure_later(
    losses: Sequence[Tensor | None], weights: Tensor, probe: Probe, tap: Sequence[Tensor] | None, base: int | None
) -> MeasureLater:
    """Take this step's gradients while its graph lives; the function returned measures once the optimizer is known.

    A loss is replaced by its first-order expansion L(θ₀) + ⟨g, θ − θ₀⟩, whose gradient is g to the last bit, so that
    the result is what :func:`~adaptive_loss.lookahead.measure` would have found at once.

    Args:
        losses, weights, probe, base: as for ``measure``.
        tap: tensors to take gradients at; None for all the optimizer moves.

    Raises:
        GraphLost: the graph of this step cannot be differentiated twice.
    """
    there = [loss for loss in losses if loss is not None]
    with torch.random.fork_rng(), torch.enable_grad():
        objective = check_objective(probe())
    roots = [*there, objective]
    points = list(tap or dict.fromkeys(leaf for root in roots for leaf in leaves(root)))
    try:
        expanded = [
            _first_order(root, points, gradient)
            for root, gradient in zip(roots, term_gradients(roots, points), strict=True)
        ]
    except RuntimeError as error:
        raise GraphLost(str(error)) from error
    rest = iter(expanded)
    live = [None if loss is None else next(rest) for loss in losses]

    def finish(parameters: Sequence[Tensor], optimizer: Optimizer) -> LookAhead | None:
        return measure(live, weights, lambda: expanded[-1], tap or parameters, optimizer, base)

    return finish


def moved(optimizer: Optimizer) -> list[Tensor]:
    """The tensors that an optimizer moves, in its order."""
    return [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]


def _first_order(root: Tensor, points: Sequence[Tensor], gradient: Gradient) -> Tensor:
    with torch.enable_grad():
        expansion = root.detach() + 0 * (points[0] - points[0].detach()).sum()
        for point, part in zip(points, gradient, strict=True):
            if part is not None:
                expansion = expansion + (part * (point - point.detach())).sum()
    return expansion
