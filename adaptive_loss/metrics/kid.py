"""Kernel distance: an unbiased maximum mean discrepancy between two sets of features."""

from __future__ import annotations

from torch import Tensor

from adaptive_loss.metrics._samples import check_samples

LEAST = 2
BLOCK = 1000  # rows of the kernel at a time: 10,000 × 10,000 of them would take 800 MB


def kernel_distance(samples: Tensor, reference: Tensor) -> Tensor:
    r"""Unbiased squared MMD with the kernel :math:`k(x, y) = (x^\top y / D + 1)^3`: "KID" (Bińkowski et al. 2018).

    .. math:: \frac{\sum_{i \ne j} k(x_i, x_j)}{m(m-1)} + \frac{\sum_{i \ne j} k(y_i, y_j)}{n(n-1)}
              - \frac{2}{mn} \sum_{i,j} k(x_i, y_j)

    Differentiable. Being unbiased it may be negative, and its mean over equal distributions is 0 at any m and n. In
    features of our own, so **not comparable with KID in Inception features**.

    Args:
        samples: x, ``[m, D]``.
        reference: y, ``[n, D]``.

    Returns:
        0-dim, of the arguments' type.

    Raises:
        ValueError: m or n is below 2, or the shapes differ.

    Example:
        >>> import torch
        >>> x, y = torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [2.0]])
        >>> kernel_distance(x, y)  # off the diagonal k = 1 and 1; across 1, 1, 1 and 27
        tensor(-13.)
    """
    check_samples("the kernel distance", LEAST, samples=samples, reference=reference)
    m, n = len(samples), len(reference)
    own = (_kernel_sum(samples, samples) - _kernel_diagonal(samples)) / (m * (m - 1))
    theirs = (_kernel_sum(reference, reference) - _kernel_diagonal(reference)) / (n * (n - 1))
    return own + theirs - 2 * _kernel_sum(samples, reference) / (m * n)


def _kernel_sum(x: Tensor, y: Tensor) -> Tensor:
    # In place but for the power, whose gradient needs what it was taken of: to make room for a block takes longest.
    products = (rows @ y.T for rows in x.split(BLOCK))
    return sum((block.div_(x.shape[1]).add_(1).pow(3).sum() for block in products), x.new_zeros(()))


def _kernel_diagonal(x: Tensor) -> Tensor:
    return (x.square().mean(1) + 1).pow(3).sum()
