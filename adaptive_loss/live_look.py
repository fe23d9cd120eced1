"""The user's probe, and a look-ahead for a step whose optimizer is not known yet, as on the first after a restart."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from adaptive_loss.gradients import Gradient, LookAhead, leaves, term_gradients
from adaptive_loss.lookahead import Probe, check_objective, kept_graph, measure, probe_value
from adaptive_loss.parallel import Group

MeasureLater = Callable[[Sequence[Tensor], Optimizer], LookAhead | None]
"""The parameters the optimizer moves, and the optimizer → what the look-ahead found."""


class Objective:
    """A user's probe, with its generator kept where the next look-ahead should draw from.

    Args:
        probe: the objective on held-out data.

    Raises:
        TypeError: it cannot be called.
    """

    def __init__(self, probe: Probe) -> None:
        if not callable(probe):
            raise TypeError(f"probe is a {type(probe).__name__}: give a function that returns the held-out objective")
        self.probe = probe

    def value(self) -> float:
        """The probe's value, drawn as the next look-ahead will draw it, so that asking changes no look-ahead."""
        state = self.state_dict()
        value = probe_value(self.probe)
        self.load_state_dict(state)
        return value

    def state_dict(self) -> Mapping[str, Any] | None:
        """Where the probe stands, if it can say; a module's state is not that, but the parameters that are trained."""
        save = None if isinstance(self.probe, nn.Module) else getattr(self.probe, "state_dict", None)
        return None if save is None else save()

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Go back to :meth:`state_dict`."""
        load = getattr(self.probe, "load_state_dict", None)
        if load is not None and state is not None:
            load(state)


def measure_later(
    losses: Sequence[Tensor | None],
    weights: Tensor,
    probe: Probe,
    tap: Sequence[Tensor] | None,
    base: int | None,
    group: Group = None,
) -> MeasureLater:
    """Take this step's gradients while its graph lives; the function returned measures once the optimizer is known.

    A loss is replaced by its first-order expansion L(θ₀) + ⟨g, θ − θ₀⟩, whose gradient is g to the last bit, so that
    the result is what :func:`~adaptive_loss.lookahead.measure` would have found at once.

    Args:
        losses, weights, probe, base, group: as for ``measure``.
        tap: tensors to take gradients at; None for all the optimizer moves.

    Raises:
        GraphLost: the graph of this step cannot be differentiated twice.
    """
    there = [loss for loss in losses if loss is not None]
    with torch.random.fork_rng(), torch.enable_grad():
        objective = check_objective(probe())
    roots = [*there, objective]
    points = list(tap or dict.fromkeys(leaf for root in roots for leaf in leaves(root)))
    with kept_graph(group):
        gradients = term_gradients(roots, points)
    expanded = [_first_order(root, points, gradient) for root, gradient in zip(roots, gradients, strict=True)]
    rest = iter(expanded)
    live = [None if loss is None else next(rest) for loss in losses]

    def finish(parameters: Sequence[Tensor], optimizer: Optimizer) -> LookAhead | None:
        return measure(live, weights, lambda: expanded[-1], tap or parameters, optimizer, base, group)

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
