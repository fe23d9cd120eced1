"""A plain physics-informed network, against which `adaptive-loss train pinn --quick` is checked.

python -m benchmarks.reference.pinn burgers 1 2
"""

from __future__ import annotations

import itertools
import math
import sys

import torch
from torch import Tensor, nn

from adaptive_loss.data import datasets

EPOCHS, BATCH, BORDER, LR, WIDTH = 75, 128, 100, 1e-3, 50
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


def burgers_loss(net: nn.Module, points: Tensor) -> Tensor:
    """Residual + boundary + initial, each a mean square, with weights 1."""
    u = net(points)
    first = slope(u, points)
    u_t, u_x = first[:, :1], first[:, 1:]
    u_xx = slope(u_x, points)[:, 1:]
    residual = (u_t + u * u_x - 0.01 / PI * u_xx).square().mean()
    sides = torch.stack([torch.rand(BORDER), torch.tensor([-1.0, 1.0]).repeat(BORDER // 2)], 1)
    x = 2 * torch.rand(BORDER, 1) - 1
    begins = net(torch.cat([torch.zeros_like(x), x], 1)) + torch.sin(PI * x)
    return residual + net(sides).square().mean() + begins.square().mean()


def helmholtz_loss(net: nn.Module, points: Tensor) -> Tensor:
    """Residual + boundary, each a mean square, with weights 1."""
    u = net(points)
    first = slope(u, points)
    laplacian = slope(first[:, :1], points)[:, :1] + slope(first[:, 1:], points)[:, 1:]
    x, y = points.detach().split(1, dim=1)
    source = (1 - 17 * PI**2) * torch.sin(PI * x) * torch.sin(4 * PI * y)
    residual = (laplacian + u - source).square().mean()
    along, side = 2 * torch.rand(BORDER) - 1, torch.tensor([-1.0, 1.0]).repeat(BORDER // 2)
    edges = torch.stack([along, side], 1)
    edges[: BORDER // 2] = edges[: BORDER // 2].flip(1)
    return residual + net(edges).square().mean()


LOSSES = {"burgers": burgers_loss, "helmholtz": helmholtz_loss}


def train(dataset: str, seed: int) -> float:
    """The relative L2 error on the test grid."""
    data = datasets.get(dataset)()
    torch.manual_seed(seed)
    net = network()
    steps = EPOCHS * (len(data.train) // BATCH)
    optimizer = torch.optim.Adam(net.parameters(), lr=LR)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3 * LR, total_steps=steps, div_factor=3)
    for _ in range(EPOCHS):
        order = torch.randperm(len(data.train))
        for rows in order.split(BATCH)[: len(data.train) // BATCH]:
            optimizer.zero_grad()
            LOSSES[dataset](net, data.train.inputs[rows].requires_grad_()).backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        error = net(data.test.inputs) - data.test.targets
    return float(error.norm() / data.test.targets.norm())


if __name__ == "__main__":
    torch.set_num_threads(1)
    for seed in sys.argv[2:]:
        print(f"{sys.argv[1]}, seed {seed}: relative L2 error {train(sys.argv[1], int(seed)):.4f}")
