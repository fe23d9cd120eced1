"""Many terms in one tensor: per-sample losses, gathered by the bucket (timestep, noise level, class) of each sample."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Buckets:
    """K losses of one step, to be given to an executor of K terms in place of a dict, in term order.

    Args:
        means: [K] live losses; what an empty bucket holds does not matter.
        present: [K] bool, the buckets with at least one sample.

    Raises:
        ValueError: the two do not fit together.
        TypeError: losses that are no real floating-point numbers.
    """

    means: Tensor
    present: Tensor

    def __post_init__(self) -> None:
        if self.means.dim() != 1 or self.present.shape != self.means.shape:
            shapes = f"{list(self.means.shape)} and {list(self.present.shape)}"
            raise ValueError(f"buckets need means and present of one shape [K], not {shapes}")
        if not self.means.is_floating_point():
            raise TypeError(f"buckets hold {self.means.dtype}: give real floating-point losses")


def bucket_means(per_sample: Tensor, index: Tensor, n_buckets: int) -> Buckets:
    """Lₖ = mean of ℓᵦ over the samples b with bucket k, for all K buckets at once, differentiable in ℓ.

    With start weights 1/K the executor's total is the mean over buckets; it is the mean over samples where the buckets
    are equally likely, whatever a batch happens to draw.

    Args:
        per_sample: [B] losses ℓ.
        index: [B] whole numbers in [0, K), each sample's bucket.
        n_buckets: K.

    Raises:
        TypeError: an index that is not of whole numbers.
        ValueError: shapes that differ, or a bucket outside [0, K).

    Example:
        >>> import torch
        >>> found = bucket_means(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 0, 2]), 3)
        >>> found.means.tolist(), found.present.tolist()
        ([2.0, 0.0, 5.0], [True, False, True])
    """
    if per_sample.dim() != 1 or index.shape != per_sample.shape:
        raise ValueError(f"per_sample {list(per_sample.shape)} and index {list(index.shape)} must both be [B]")
    if index.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"index has dtype {index.dtype}: give whole numbers, index.long()")
    if index.device.type == "cpu" and len(index) and not 0 <= int(index.min()) <= int(index.max()) < n_buckets:
        raise ValueError(f"buckets {int(index.min())} to {int(index.max())} do not lie in [0, {n_buckets})")
    count = torch.zeros(n_buckets, dtype=per_sample.dtype, device=per_sample.device)
    count = count.index_add(0, index, torch.ones_like(per_sample))
    sums = torch.zeros_like(count).index_add(0, index, per_sample)
    return Buckets(sums / count.clamp_min(1), count > 0)
