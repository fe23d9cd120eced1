"""A physics-informed network: a function that is trained to solve a differential equation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor, nn

from adaptive_loss.data import burgers, helmholtz
from adaptive_loss.data._equations import Corner, Solution, grid, uniform
from adaptive_loss.losses import LossTerms
from adaptive_loss.models.mlp import MLP
from adaptive_loss.probes import held_out
from adaptive_loss.seeding import own_generator
from adaptive_loss.tasks import tasks
from adaptive_loss.tasks.base import PointTask, check_choice

BORDER_POINTS = 100
"""Points of the boundary, and of the initial line, drawn anew at every step."""
PROBE_BATCH = 256
PICTURE_SIDE = 100
PICTURE_DECADES = 4
"""Errors from 10⁻⁴ of the solution's range (black) up to all of it (white) can be seen in a picture."""

Network = Callable[[Tensor], Tensor]
"""Points [N, 2] → û, [N, 1], each row from its own point alone."""


def slopes(values: Tensor, points: Tensor) -> Tensor:
    """∂/∂points of [N] values, each of which depends on its own point alone, [N, 2]; can be differentiated again."""
    return torch.autograd.grad(values.sum(), points, create_graph=True)[0]


def burgers_residual(network: Network, points: Tensor) -> Tensor:
    """r = u_t + u·u_x − ν·u_xx at points (t, x), [N, 2] → [N] (Raissi, Perdikaris & Karniadakis 2019, §3.1)."""
    points = points.clone().requires_grad_()
    u = network(points)[:, 0]
    u_t, u_x = slopes(u, points).unbind(1)
    return u_t + u * u_x - burgers.VISCOSITY * slopes(u_x, points)[:, 1]


def helmholtz_residual(network: Network, points: Tensor) -> Tensor:
    """r = u_xx + u_yy + k²u − q at points (x, y), [N, 2] → [N] (Wang, Teng & Perdikaris 2021, §3.3)."""
    points = points.clone().requires_grad_()
    u = network(points)[:, 0]
    u_x, u_y = slopes(u, points).unbind(1)
    laplacian = slopes(u_x, points)[:, 0] + slopes(u_y, points)[:, 1]
    return laplacian + helmholtz.WAVE_NUMBER**2 * u - helmholtz.source(points.detach())[:, 0]


@dataclass(frozen=True)
class Problem:
    """A differential equation on a rectangle, u = 0 on its sides.

    Args:
        low, high: corners of the rectangle.
        sides: coordinate and its value there, of each side on which u is 0.
        residual: network and points → what the equation leaves over, [N].
        solution: the known one.
        start: u on the line where the first coordinate is lowest, as a function of the second; None where nothing
            begins there.
    """

    low: Corner
    high: Corner
    sides: tuple[tuple[int, float], ...]
    residual: Callable[[Network, Tensor], Tensor]
    solution: Solution
    start: Callable[[Tensor], Tensor] | None = None

    def boundary(self, count: int, generator: Generator) -> Tensor:
        """``count`` points of the sides, the same number on each as far as it divides, [count, 2]."""
        points = uniform(count, self.low, self.high, generator)
        for number, (coordinate, value) in enumerate(self.sides):
            points[number :: len(self.sides), coordinate] = value
        return points

    def beginning(self, count: int, generator: Generator) -> Tensor:
        """``count`` points where the first coordinate is lowest, [count, 2]."""
        points = uniform(count, self.low, self.high, generator)
        points[:, 0] = self.low[0]
        return points


PROBLEMS: Mapping[str, Problem] = {
    "burgers": Problem(
        burgers.LOW, burgers.HIGH, ((1, -1.0), (1, 1.0)), burgers_residual, burgers.solution, burgers.start
    ),
    "helmholtz": Problem(
        helmholtz.LOW,
        helmholtz.HIGH,
        ((0, -1.0), (0, 1.0), (1, -1.0), (1, 1.0)),
        helmholtz_residual,
        helmholtz.solution,
    ),
}


@tasks.register("pinn")
class PhysicsInformed(PointTask):
    """Terms of a network û(points), each a mean square in the equation's own units.

    - ``residual`` (base): mean r² over the batch of points, r what the equation leaves over.
    - ``boundary``: mean û² over 100 points of the sides, where u is 0.
    - ``initial``: mean (û − u₀)² over 100 points of the line t = 0; never there for ``helmholtz``, which has no time.

    The objective ``measured`` is the mean squared error at the probe split's points, where the solution is known; no
    term reads it. ``evaluate`` gives ``loss``, the mean squared error on a split, and ``relative_l2`` = ‖û − u‖/‖u‖, as
    papers report it. All weights 1 is what Raissi et al. (2019) and the plain network of Wang et al. (2021) train with;
    the latter add the four sides' means up, which is a ``boundary`` of 4 here.

    Second derivatives lose too much in bf16, so all is computed in float32.
    """

    terms = ("residual", "boundary", "initial")
    base = "residual"
    datasets = ("burgers", "helmholtz")
    customary: ClassVar[Mapping[str, float]] = {"residual": 1.0, "boundary": 1.0, "initial": 1.0}
    metric = "relative_l2"
    objectives = ("measured",)
    models = ("mlp",)
    precisions = ("fp32",)
    quick: ClassVar[Mapping[str, Any]] = {"epochs": 8}
    smoke: ClassVar[Mapping[str, Any]] = {"epochs": 1, "subset": 11_000}

    def __init__(self, config: Any, data: Any, device: torch.device, **options: Any) -> None:
        super().__init__(config, data, device, **options)
        check_choice("dataset", data.name, tuple(PROBLEMS))
        self.problem = PROBLEMS[data.name]
        self.network = MLP(2, 1).to(device)
        self.model: nn.Module = self.network
        self.tap = list(self.network.parameters())
        self.borders = {name: own_generator(config.seed, name) for name in ("boundary", "initial")}
        probe = self.splits["probe"]
        self.probe = held_out(
            self._error,
            (probe.inputs, probe.targets),
            batch_size=PROBE_BATCH,
            model=self.model,
            seed=own_generator(config.seed, "probe").initial_seed(),
        )

    def losses(self, rows: Tensor) -> LossTerms:
        """The wanted terms; ``rows`` are of the residual's points, those of the borders are drawn."""
        terms: dict[str, Tensor] = {}
        if "residual" in self.wanted:
            points = self.splits["train"].inputs[rows.to(self.device)]
            terms["residual"] = self.problem.residual(self.model, points).square().mean()
        if "boundary" in self.wanted:
            points = self.problem.boundary(BORDER_POINTS, self.borders["boundary"]).to(self.device)
            terms["boundary"] = self.model(points).square().mean()
        if "initial" in self.wanted and self.problem.start is not None:
            points = self.problem.beginning(BORDER_POINTS, self.borders["initial"]).to(self.device)
            terms["initial"] = self._error(points, self.problem.start(points[:, 1:]))
        return terms

    def _error(self, points: Tensor, known: Tensor) -> Tensor:
        return (self.model(points) - known).square().mean()

    @torch.no_grad()
    def evaluate(self, split: str) -> Mapping[str, float]:
        """``loss``, the mean squared error, and ``relative_l2``, both against the known solution."""
        points = self.splits[split]
        self.model.eval()
        error = (self.model(points.inputs) - points.targets).double()
        self.model.train()
        relative = error.norm() / points.targets.double().norm()
        return {"loss": float(error.square().mean()), "relative_l2": float(relative)}

    @torch.no_grad()
    def pictures(self) -> Mapping[str, Tensor]:
        """``solution``, ``field``, ``error``, [1, 1, 100, 100] each: the first coordinate to the right, the second up.

        The known and the predicted field go from the known one's least value, black, to its greatest, white; the error
        from 10⁻⁴ of that range to all of it, on a logarithmic scale.
        """
        points = grid((PICTURE_SIDE, PICTURE_SIDE), self.problem.low, self.problem.high)
        known = self.problem.solution(points.double()).float()
        low, span = known.min(), known.max() - known.min()
        predicted = self.model(points.to(self.device)).cpu()
        decades = ((predicted - known).abs() / span).clamp_min(10.0**-PICTURE_DECADES).log10()
        fields = {
            "solution": (known - low) / span,
            "field": (predicted - low) / span,
            "error": 1 + decades / PICTURE_DECADES,
        }
        return {name: _upright(values.clamp(0, 1)) for name, values in fields.items()}

    def state_dict(self) -> dict[str, Any]:
        """The borders' generators."""
        return {name: generator.get_state() for name, generator in self.borders.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        for name, generator in self.borders.items():
            generator.set_state(state[name])


def _upright(values: Tensor) -> Tensor:
    return values.view(PICTURE_SIDE, PICTURE_SIDE).T.flip(0)[None, None]
