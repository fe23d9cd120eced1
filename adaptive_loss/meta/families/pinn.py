"""u″ + k²u = f on an interval by a network: residual, boundary and smoothness (harmful), judged by relative L2."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor, nn

from adaptive_loss.meta.families import families
from adaptive_loss.meta.families.base import BATCH, Family, Run, Tensors, between, whole

MEASURED = 100
NOISE = 0.02


class Solution(Run):
    """u(x) with two hidden layers of tanh; its derivatives are carried along through the layers."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(1, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, 1)

    def derivatives(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """u, u′ and u″ at x, each [B, 1]."""
        value, slope, bend = x, torch.ones_like(x), torch.zeros_like(x)
        for layer in (self.first, self.middle):
            value = torch.tanh(layer(value))
            steep, slope, bend = 1 - value.square(), slope @ layer.weight.T, bend @ layer.weight.T
            slope, bend = steep * slope, steep * bend - 2 * value * steep * slope.square()
        return self.last(value), slope @ self.last.weight.T, bend @ self.last.weight.T

    def losses(self, data: Tensors, draw: Tensors) -> Tensor:
        """[3]."""
        x = draw["x"]
        u, slope, bend = self.derivatives(x)
        force = truth(x, data)[1]
        ends = torch.tensor([[-1.0], [1.0]])
        boundary = self.derivatives(ends)[0] - truth(ends, data)[0]
        residual = (bend + data["wave"].square() * u - force) / data["wave"].square()
        return torch.stack([residual.square().mean(), boundary.square().mean(), slope.square().mean()])

    def objective(self, data: Tensors, draw: Tensors) -> Tensor:
        """Squared error at measured points."""
        x = data["measured_x"][draw["rows"]]
        return (self.derivatives(x)[0] - data["measured_u"][draw["rows"]]).square().mean()

    def judged(self, data: Tensors) -> Tensor:
        """Relative L2 error."""
        x = torch.linspace(-1, 1, 200)[:, None]
        u = truth(x, data)[0]
        return ((self.derivatives(x)[0] - u).square().mean() / u.square().mean()).sqrt()


def truth(x: Tensor, data: Tensors) -> tuple[Tensor, Tensor]:
    """u = sin(ax + b) and f = (k² − a²)·u."""
    u = torch.sin(data["rate"] * x + data["phase"])
    return u, (data["wave"].square() - data["rate"].square()) * u


@families.register("pinn")
class PhysicsFamily(Family):
    """Helmholtz equations in one dimension."""

    name = "pinn"
    terms = ("residual", "boundary", "smoothness")
    base = "residual"
    customary = (1.0, 1.0, 0.01)

    def __init__(self, dice: Generator) -> None:
        super().__init__(dice)
        self.measured = whole(20, MEASURED, dice)

    def run(self) -> Run:
        """A network."""
        return Solution(self.hidden)

    def data(self, dice: Generator) -> dict[str, Tensor]:
        """An equation that is drawn once a run, and noisy measurements of its solution."""
        data = {"rate": between(1.0, 3.5, dice), "wave": between(1.0, 3.0, dice), "phase": between(0, math.pi, dice)}
        found = {name: torch.tensor(value) for name, value in data.items()}
        x = 2 * torch.rand(MEASURED, 1, generator=dice) - 1
        u = truth(x, found)[0] + NOISE * torch.randn(MEASURED, 1, generator=dice)
        return {**found, "measured_x": x, "measured_u": u}

    def draws(self, steps: int, dice: Generator) -> dict[str, Tensor]:
        """Points of the interval."""
        return {"x": 2 * torch.rand(steps, BATCH, 1, generator=dice) - 1}

    def looks(self, count: int, dice: Generator) -> dict[str, Tensor]:
        """Of the measurements that there are, drawn with replacement."""
        return {"rows": torch.randint(self.measured, (count, BATCH), generator=dice)}

    def learning_rate(self, dice: Generator) -> float:
        """Twice the others'."""
        return 2 * super().learning_rate(dice)
