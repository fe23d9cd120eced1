"""Points of Burgers' and Helmholtz' equations, and whether the known solutions solve them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from adaptive_loss.data import burgers, datasets, helmholtz
from adaptive_loss.data._equations import grid, uniform
from adaptive_loss.data.points import PointDataset
from adaptive_loss.errors import UsageError

NAMES = ["burgers", "helmholtz"]
DIGEST = 64  # letters of a SHA-256


def derivative(values: Tensor, points: Tensor) -> Tensor:
    return torch.autograd.grad(values.sum(), points, create_graph=True)[0]


def inner(count: int, low: tuple[float, float], high: tuple[float, float]) -> Tensor:
    return uniform(count, low, high, torch.Generator().manual_seed(0)).double().requires_grad_()


def test_burgers_solution_solves_the_equation() -> None:
    points = inner(500, burgers.LOW, burgers.HIGH)
    u = burgers.solution(points)[:, 0]
    u_t, u_x = derivative(u, points).unbind(1)
    left_over = u_t + u * u_x - 0.01 / math.pi * derivative(u_x, points)[:, 1]
    # The parts reach hundreds at the shock, where they cancel.
    assert float(u_x.detach().abs().max()) > 50
    assert float(left_over.detach().abs().max()) < 1e-8


def test_burgers_solution_begins_at_its_start_and_is_0_on_the_sides() -> None:
    x, t = torch.linspace(-1, 1, 21, dtype=torch.float64), torch.linspace(0, 1, 21, dtype=torch.float64)
    begins = burgers.solution(torch.stack([torch.zeros_like(x), x], 1))[:, 0]
    torch.testing.assert_close(begins, -torch.sin(math.pi * x), rtol=0, atol=1e-12)
    torch.testing.assert_close(burgers.start(x), begins, rtol=0, atol=1e-12)
    for side in (-1.0, 0.0, 1.0):
        there = burgers.solution(torch.stack([t, torch.full_like(t, side)], 1))
        torch.testing.assert_close(there, torch.zeros_like(there), rtol=0, atol=1e-12)


def test_burgers_solution_is_odd() -> None:
    points = inner(100, burgers.LOW, burgers.HIGH).detach()
    mirrored = points * torch.tensor([1.0, -1.0], dtype=torch.float64)
    torch.testing.assert_close(burgers.solution(mirrored), -burgers.solution(points), rtol=0, atol=1e-12)


def test_burgers_solution_against_integrals_by_the_trapezoidal_rule() -> None:
    # Another quadrature, on 4,001 even nodes of z in [−12, 12], in numpy.
    z, viscosity = np.linspace(-12, 12, 4001), 0.01 / np.pi
    for t, x in ((0.25, 0.5), (0.5, -0.1), (1.0, 0.1), (1.0, 0.01)):
        y = np.pi * (x - np.sqrt(4 * viscosity * t) * z)
        mass = np.exp(-np.cos(y) / (2 * np.pi * viscosity) - z**2)
        found = burgers.solution(torch.tensor([[t, x]], dtype=torch.float64))
        assert float(found) == pytest.approx(-(np.sin(y) * mass).sum() / mass.sum(), rel=1e-10)


def test_helmholtz_solution_solves_the_equation() -> None:
    points = inner(200, helmholtz.LOW, helmholtz.HIGH)
    u = helmholtz.solution(points)[:, 0]
    u_x, u_y = derivative(u, points).unbind(1)
    laplacian = derivative(u_x, points)[:, 0] + derivative(u_y, points)[:, 1]
    torch.testing.assert_close(laplacian + u, helmholtz.source(points)[:, 0])


@pytest.mark.parametrize("name", NAMES)
def test_splits(name: str) -> None:
    data: PointDataset = datasets.get(name)()
    module = {"burgers": burgers, "helmholtz": helmholtz}[name]
    assert (len(data.train), len(data.probe), len(data.select)) == (100_000, 500, 500)
    assert len(data.test) == module.GRID[0] * module.GRID[1]
    low, high = torch.tensor(module.LOW), torch.tensor(module.HIGH)
    for part in (data.train, data.probe, data.select, data.test):
        assert (part.inputs >= low).all() and (part.inputs <= high).all()
        # A quarter of the points in each quarter of the rectangle, within 3.5 standard deviations.
        share = (part.inputs < (low + high) / 2).all(1).double().mean()
        assert float(share) == pytest.approx(0.25, abs=3.5 * math.sqrt(0.1875 / len(part)))
    assert torch.equal(data.test.inputs[0], low) and torch.equal(data.test.inputs[-1], high)
    assert data.train.targets.isnan().all() and len(data.held_in) == 101_000
    for part in (data.probe, data.select, data.test):
        torch.testing.assert_close(part.targets, module.solution(part.inputs.double()).float())
    drawn = torch.cat([part.inputs for part in (data.train, data.probe, data.select)])
    assert len(drawn.unique(dim=0)) == 101_000
    assert data.provenance["name"] == name and len(str(data.provenance["sha256"])) == DIGEST


@pytest.mark.parametrize("name", NAMES)
def test_the_seed_draws_all_but_the_test(name: str) -> None:
    load = datasets.get(name)
    one, same, other = load(seed=1), load(seed=1), load(seed=2)
    for part in ("train", "probe", "select"):
        assert torch.equal(getattr(one, part).inputs, getattr(same, part).inputs)
        assert not torch.equal(getattr(one, part).inputs, getattr(other, part).inputs)
    assert torch.equal(one.test.inputs, other.test.inputs)
    assert one.provenance == same.provenance and one.provenance["sha256"] != other.provenance["sha256"]


@pytest.mark.parametrize("name", NAMES)
def test_a_tenth_of_a_small_subset_is_measured_and_the_test_stays(name: str) -> None:
    data = datasets.get(name)(subset=1100)
    assert (len(data.train), len(data.probe), len(data.select)) == (880, 110, 110)
    assert torch.equal(data.test.inputs, datasets.get(name)().test.inputs)
    smallest = datasets.get(name)(subset=10)
    assert (len(smallest.train), len(smallest.probe), len(smallest.select)) == (8, 1, 1)
    with pytest.raises(UsageError, match="--subset 9 is too small to split; use 10 or more"):
        datasets.get(name)(subset=9)


def test_a_grid_has_its_edges() -> None:
    points = grid((3, 2), (0.0, -1.0), (1.0, 1.0))
    assert points.tolist() == [[0, -1], [0, 1], [0.5, -1], [0.5, 1], [1, -1], [1, 1]]
