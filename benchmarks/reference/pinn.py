"""A plain physics-informed network, against which `adaptive-loss train pinn --quick` is checked.

`python -m benchmarks.reference.pinn burgers 1 2` against `adaptive-loss train pinn --quick --dataset burgers --seed 1`:
both draw the same initialisation, order and borders, and differ in rounding alone, which grows over 6,248 steps. The
relative L2 error on the test grid with all weights 1, on a two-core x86-64 virtual machine, one thread:

| dataset | seed | here | the task |
|---|---|---|---|
| burgers | 1 | 0.2193 | 0.2118 |
| burgers | 2 | 0.2968 | 0.2968 |
| helmholtz | 1 | 10.6609 | 10.7092 |
| helmholtz | 2 | 1.8860 | 1.8923 |
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Mapping, Sequence

import torch
from torch import Generator, Tensor, nn

from adaptive_loss.data import datasets
from adaptive_loss.data.points import PointDataset
from adaptive_loss.seeding import own_generator

EPOCHS, BATCH, BORDER, LR, WIDTH = 8, 128, 100, 1e-3, 50
PI = math.pi


def network() -> nn.Sequential:
    """Three hidden layers of 50 tanh units."""
    sizes = [2, WIDTH, WIDTH, WIDTH]
    hidden = [part for a, b in itertools.pairwise(sizes) for part in (nn.Linear(a, b), nn.Tanh())]
    net = nn.Sequential(*hidden, nn.Linear(WIDTH, 1))
    for layer in net[::2]:
        nn.init.xavier_normal_(layer.weight)
        nn.init.zeros_(layer.bias)
    return net


def slope(u: Tensor, points: Tensor) -> Tensor:
    """∂u/∂points, row by row."""
    return torch.autograd.grad(u.sum(), points, create_graph=True)[0]


def border(low: Tensor, sides: Sequence[tuple[int, float]], draw: Generator) -> Tensor:
    """100 points of the rectangle from ``low`` to (1, 1), moved to its sides in turn."""
    points = low + (1 - low) * torch.rand(BORDER, 2, generator=draw)
    for number, (coordinate, value) in enumerate(sides):
        points[number :: len(sides), coordinate] = value
    return points


def burgers_loss(net: nn.Module, points: Tensor, draws: Mapping[str, Generator]) -> Tensor:
    """Residual + boundary + initial, each a mean square, with weights 1."""
    u = net(points)
    first = slope(u, points)
    u_t, u_x = first[:, :1], first[:, 1:]
    residual = u_t + u * u_x - 0.01 / PI * slope(u_x, points)[:, 1:]
    low = torch.tensor([0.0, -1.0])
    at_sides = net(border(low, [(1, -1.0), (1, 1.0)], draws["boundary"]))
    begins = border(low, [(0, 0.0)], draws["initial"])
    missed = net(begins) + torch.sin(PI * begins[:, 1:])
    return residual.square().mean() + at_sides.square().mean() + missed.square().mean()


def helmholtz_loss(net: nn.Module, points: Tensor, draws: Mapping[str, Generator]) -> Tensor:
    """Residual + boundary, each a mean square, with weights 1."""
    u = net(points)
    first = slope(u, points)
    laplacian = slope(first[:, :1], points)[:, :1] + slope(first[:, 1:], points)[:, 1:]
    x, y = points.detach().split(1, dim=1)
    residual = laplacian + u - (1 - 17 * PI**2) * torch.sin(PI * x) * torch.sin(4 * PI * y)
    edges = [(0, -1.0), (0, 1.0), (1, -1.0), (1, 1.0)]
    at_edges = net(border(torch.tensor([-1.0, -1.0]), edges, draws["boundary"]))
    return residual.square().mean() + at_edges.square().mean()


LOSSES = {"burgers": burgers_loss, "helmholtz": helmholtz_loss}


def train(data: PointDataset, seed: int, epochs: int = EPOCHS, batch: int = BATCH) -> float:
    """The relative L2 error on the test grid; initialisation, order and borders are drawn as the task draws them."""
    torch.manual_seed(seed)
    net = network()
    draws = {name: own_generator(seed, name) for name in ("order", "boundary", "initial")}
    steps = len(data.train) // batch
    optimizer = torch.optim.Adam(net.parameters(), lr=LR)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3 * LR, total_steps=epochs * steps, div_factor=3)
    for _ in range(epochs):
        for rows in torch.randperm(len(data.train), generator=draws["order"]).split(batch)[:steps]:
            optimizer.zero_grad()
            LOSSES[data.name](net, data.train.inputs[rows].requires_grad_(), draws).backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        error = net(data.test.inputs) - data.test.targets
    return float(error.norm() / data.test.targets.norm())


if __name__ == "__main__":
    torch.set_num_threads(1)
    for seed in sys.argv[2:]:
        found = train(datasets.get(sys.argv[1])(), int(seed))
        print(f"{sys.argv[1]}, seed {seed}: relative L2 error {found:.4f}", flush=True)
