"""Metrics of samples against closed forms, plain double loops and what they must refuse."""

from __future__ import annotations

import math
from itertools import permutations

import numpy as np
import pytest
import torch
from torch import Tensor

from adaptive_loss.metrics import frechet, kid, prdc
from adaptive_loss.metrics.bits_per_dim import bits_per_dim
from adaptive_loss.metrics.calibration import calibration_error
from adaptive_loss.metrics.frechet import frechet_distance, gaussian_distance
from adaptive_loss.metrics.kid import kernel_distance
from adaptive_loss.metrics.prdc import precision_recall_density_coverage


def normal(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- kernel distance


def plain_kernel_distance(x: np.ndarray, y: np.ndarray) -> float:
    """Eq. 4 of Bińkowski et al. 2018 as it is written, one pair at a time."""

    def k(a: np.ndarray, b: np.ndarray) -> float:
        return (float(a @ b) / len(a) + 1) ** 3

    own = sum(k(a, b) for a, b in permutations(x, 2)) / (len(x) * (len(x) - 1))
    theirs = sum(k(a, b) for a, b in permutations(y, 2)) / (len(y) * (len(y) - 1))
    return own + theirs - 2 * sum(k(a, b) for a in x for b in y) / (len(x) * len(y))


@pytest.mark.parametrize(("m", "n", "d"), [(2, 2, 1), (7, 5, 3), (4, 9, 16)])
def test_kernel_distance_is_the_double_loop(m: int, n: int, d: int) -> None:
    x, y = normal(m, d, 1), normal(n, d, 2) + 0.5
    assert float(kernel_distance(x, y)) == pytest.approx(plain_kernel_distance(x.numpy(), y.numpy()), rel=1e-12)


def test_kernel_distance_in_blocks_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = normal(23, 4, 1), normal(17, 4, 2)
    whole = kernel_distance(x, y)
    monkeypatch.setattr(kid, "BLOCK", 5)
    torch.testing.assert_close(kernel_distance(x, y), whole)


@pytest.mark.parametrize("n", [4, 25])
def test_kernel_distance_of_one_distribution_is_0_on_average_at_any_size(n: int) -> None:
    # A biased estimate would be about E[k(x, x) − k(x, y)]·2/n too high: far outside four standard errors.
    draws = torch.stack([kernel_distance(normal(n, 3, 2 * i), normal(n, 3, 2 * i + 1)) for i in range(400)])
    error = float(draws.std()) / math.sqrt(len(draws))
    assert abs(float(draws.mean())) < 4 * error
    assert float((draws < 0).double().mean()) > 0.2
    squares = normal(4000, 3).square().sum(1)
    bias = float(((squares / 3 + 1) ** 3).mean() - 1) / n
    assert bias > 8 * error


def test_kernel_distance_of_point_masses_by_hand() -> None:
    # All x at 1, all y at 2, D = 1: k is 8, 125 and 27.
    found = kernel_distance(torch.ones(3, 1), torch.full((5, 1), 2.0))
    assert float(found) == pytest.approx(8 + 125 - 2 * 27)


def test_kernel_distance_is_symmetric_and_its_gradient_is_right() -> None:
    x, y = normal(4, 2, 1).requires_grad_(), normal(3, 2, 2)
    torch.testing.assert_close(kernel_distance(x, y), kernel_distance(y, x))
    assert torch.autograd.gradcheck(lambda x: kernel_distance(x, y), x)


# ---- Fréchet distance


def test_distance_of_two_gaussians_in_closed_form() -> None:
    # Covariances that commute: ‖μ₁ − μ₂‖² + Σ (√aᵢ − √bᵢ)² over their eigenvalues.
    turn, _ = torch.linalg.qr(normal(4, 4))
    a, b = torch.tensor([1.0, 4.0, 9.0, 0.0]).double(), torch.tensor([4.0, 4.0, 1.0, 2.0]).double()
    mean, other = normal(4, 1, 1)[:, 0], normal(4, 1, 2)[:, 0]
    found = gaussian_distance(mean, turn * a @ turn.T, other, turn * b @ turn.T)
    closed = float((mean - other).square().sum() + (a.sqrt() - b.sqrt()).square().sum())
    assert found == pytest.approx(closed, rel=1e-6)  # the root of an eigenvalue 0 has half the digits


def test_distance_of_gaussians_that_do_not_commute_in_closed_form() -> None:
    # In two dimensions tr (AB)½ = √(tr AB + 2√det AB).
    a = torch.tensor([[2.0, 0.5], [0.5, 1.0]]).double()
    b = torch.tensor([[1.0, -0.8], [-0.8, 3.0]]).double()
    zero = torch.zeros(2).double()
    product = a @ b
    root = math.sqrt(float(product.trace()) + 2 * math.sqrt(float(torch.det(product))))
    assert gaussian_distance(zero, a, zero, b) == pytest.approx(float(a.trace() + b.trace()) - 2 * root, rel=1e-9)


def test_frechet_distance_is_that_of_the_fitted_gaussians() -> None:
    x, y = normal(50, 3, 1), normal(40, 3, 2) * 2 + 1
    covariances = [torch.from_numpy(np.cov(part.numpy().T)) for part in (x, y)]
    expected = gaussian_distance(x.mean(0), covariances[0], y.mean(0), covariances[1])
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(x, x + 2) == pytest.approx(12, rel=1e-9)


def test_frechet_distance_of_what_is_not_finite_is_nan() -> None:
    x = normal(10, 2)
    assert math.isnan(frechet_distance(torch.where(x > 1, math.inf, x), x))


def test_agreement_with_torchmetrics() -> None:
    fid = pytest.importorskip("torchmetrics.image.fid")
    kernel = pytest.importorskip("torchmetrics.image.kid")
    x, y = normal(60, 5, 1), normal(60, 5, 2) + 0.3
    theirs = fid._compute_fid(x.mean(0), torch.cov(x.T), y.mean(0), torch.cov(y.T))
    assert frechet_distance(x, y) == pytest.approx(float(theirs), rel=1e-6)
    assert float(kernel_distance(x, y)) == pytest.approx(float(kernel.poly_mmd(x, y)), rel=1e-9)


# ---- precision, recall, density, coverage


def plain_prdc(x: np.ndarray, y: np.ndarray, k: int) -> dict[str, float]:
    def radius(points: np.ndarray, i: int) -> float:
        return sorted(float(np.linalg.norm(points[i] - other)) for other in points)[k]

    inside = [[float(np.linalg.norm(a - b)) <= radius(y, i) for i, b in enumerate(y)] for a in x]
    back = [[float(np.linalg.norm(a - b)) <= radius(x, j) for b in y] for j, a in enumerate(x)]
    return {
        "precision": float(np.mean([any(row) for row in inside])),
        "recall": float(np.mean([any(column) for column in zip(*back, strict=True)])),
        "density": float(np.sum(inside)) / (k * len(x)),
        "coverage": float(np.mean([any(column) for column in zip(*inside, strict=True)])),
    }


@pytest.mark.parametrize("k", [1, 3])
def test_prdc_is_the_double_loop(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prdc, "BLOCK", 7)
    x, y = normal(20, 2, 1) + 0.7, normal(17, 2, 2)
    found = precision_recall_density_coverage(x, y, k)
    assert found == pytest.approx(plain_prdc(x.numpy(), y.numpy(), k))
    assert 0 < found["precision"] < 1 or 0 < found["recall"] < 1


def test_prdc_knows_a_lost_mode_from_bad_samples() -> None:
    near, far = normal(30, 2, 1), normal(30, 2, 2) + 50
    lost = precision_recall_density_coverage(near, torch.cat([near, far]), k=3)
    assert lost["precision"] == 1 and lost["recall"] == lost["coverage"] == 0.5
    bad = precision_recall_density_coverage(torch.cat([near, far]), near, k=3)
    assert bad["precision"] == 0.5 and bad["recall"] == bad["coverage"] == 1


# ---- bits, and what is refused


def test_bits_per_dim_by_hand() -> None:
    assert bits_per_dim(2 * math.log(2), 4) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="at least 1"):
        bits_per_dim(1.0, 0)


def test_too_few_samples_are_refused_with_the_number_needed() -> None:
    with pytest.raises(ValueError, match=r"kernel distance needs at least 2 samples .* samples has 1"):
        kernel_distance(normal(1, 3), normal(5, 3))
    with pytest.raises(ValueError, match=r"Fréchet distance needs at least 4 samples of 3 features; reference has 3"):
        frechet_distance(normal(4, 3), normal(3, 3))
    with pytest.raises(ValueError, match=r"k = 5 needs at least 6 samples"):
        precision_recall_density_coverage(normal(5, 2), normal(9, 2))
    with pytest.raises(ValueError, match="k is 0"):
        precision_recall_density_coverage(normal(5, 2), normal(9, 2), k=0)
    assert frechet.least_samples(3) == 4


@pytest.mark.parametrize("other", [torch.zeros(9, 2), torch.zeros(9), torch.zeros(9, 3, 1)])
def test_features_that_do_not_fit_are_refused(other: Tensor) -> None:
    for metric in (kernel_distance, frechet_distance, precision_recall_density_coverage):
        with pytest.raises(ValueError, match=r"\[N, D\]"):
            metric(normal(9, 3), other)


# ---- calibration ----------------------------------------------------------------------------------------------------


def test_calibration_error_by_hand() -> None:
    # Two bins: confidences .6, .7 (one right of two) and .9, 1 (both right); |1.3 − 1|/4 + |1.9 − 2|/4.
    top = torch.tensor([0.6, 0.7, 0.9, 1.0])
    probabilities = torch.stack([top, 1 - top], dim=1)
    found = calibration_error(probabilities, torch.tensor([0, 1, 0, 0]), bins=4)
    assert found == pytest.approx((abs(0.6 + 0.7 - 1) + abs(0.9 + 1.0 - 2)) / 4)
    assert calibration_error(torch.eye(3), torch.arange(3)) == 0.0
    with pytest.raises(ValueError, match="at least one example"):
        calibration_error(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long))


def test_a_classifier_that_draws_from_its_own_probabilities_is_calibrated() -> None:
    dice = torch.Generator().manual_seed(0)
    probabilities = torch.randn(40_000, 4, generator=dice).softmax(1)
    labels = torch.multinomial(probabilities, 1, generator=dice).flatten()
    assert calibration_error(probabilities, labels) < 0.01
    assert calibration_error((3 * probabilities.log()).softmax(1), labels) > 0.1
