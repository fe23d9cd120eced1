"""Adam and momentum for stacked parameters, every row with its own learning rate."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BETAS, EPS, MOMENTUM = (0.9, 0.999), 1e-8, 0.9


class StackedOptimizer:
    """Adam (Kingma & Ba 2015) or SGD with momentum, elementwise, so that rows never meet.

    A row whose gradient is not finite stands still from then on, and is ``lost``.

    Args:
        parameters: [N, …] each.
        rate: [N] learning rates.
        kind: ``adam`` or ``momentum``.
    """

    def __init__(self, parameters: Sequence[Tensor], rate: Tensor, kind: str) -> None:
        self.parameters, self.rate, self.kind = list(parameters), rate, kind
        self.first = [torch.zeros_like(p, requires_grad=False) for p in parameters]
        self.second = [torch.zeros_like(p, requires_grad=False) for p in parameters] if kind == "adam" else []
        self.lost = torch.zeros(len(rate), dtype=torch.bool)
        self.done = 0

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], level: float = 1.0) -> None:
        """Move all parameters, with this part of the learning rates."""
        self.done += 1
        self.lost |= ~torch.stack([g.flatten(1).sum(1).isfinite() for g in gradients]).all(0)
        rate, lost = torch.where(self.lost, 0.0, level * self.rate), bool(self.lost.any())
        for i, (parameter, gradient) in enumerate(zip(self.parameters, gradients, strict=True)):
            if lost:
                gradient = gradient.masked_fill(_beside(self.lost, gradient), 0.0)
            parameter.sub_(_beside(rate, parameter) * self._direction(i, gradient))

    def _direction(self, i: int, gradient: Tensor) -> Tensor:
        first = self.first[i]
        if self.kind == "momentum":
            return first.mul_(MOMENTUM).add_(gradient)
        first.lerp_(gradient, 1 - BETAS[0])
        self.second[i].mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
        return first / (1 - BETAS[0] ** self.done) / self._root(i)

    def _root(self, i: int) -> Tensor:
        return (self.second[i] / (1 - BETAS[1] ** self.done)).sqrt_().add_(EPS)

    def metric(self) -> list[Tensor]:
        """P, by which it scales a gradient, [N, …] a parameter; 1 for momentum and before Adam's first step."""
        if self.kind == "momentum" or not self.done:
            return [torch.ones_like(p, requires_grad=False) for p in self.parameters]
        return [1 / self._root(i) for i in range(len(self.parameters))]

    def rescale(self, ratio: Tensor) -> None:
        """Make Adam's memory what it would be had all gradients been ``ratio`` times as long, [N].

        Momentum is left alone, as by :func:`~adaptive_loss.optimizer_memory.rescale_memory`.
        """
        if self.kind == "momentum":
            return
        for first, second in zip(self.first, self.second, strict=True):
            first.mul_(_beside(ratio, first))
            second.mul_(_beside(ratio.square(), second))

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Make the memory of the rows ``target`` that of the rows ``source``."""
        for part in (*self.first, *self.second, self.lost):
            part[target] = part[source]


def _beside(rows: Tensor, value: Tensor) -> Tensor:
    """[N] in a shape that goes with [N, …]."""
    return rows.to(value.dtype if rows.is_floating_point() else rows.dtype).view(-1, *[1] * (value.dim() - 1))
