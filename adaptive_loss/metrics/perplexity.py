"""How much of a codebook is in use."""

from __future__ import annotations

import torch
from torch import Tensor


def codebook_perplexity(indices: Tensor, codes: int) -> float:
    """exp(−Σₖ pₖ log pₖ) with pₖ the share of code k: from 1 (one code does it all) to K (all equally often).

    Args:
        indices: of the codes used, any shape, values from 0.
        codes: K.

    Raises:
        ValueError: there is no index.

    Example:
        >>> codebook_perplexity(torch.tensor([0, 1, 2, 3]), 8)
        4.0
    """
    if not indices.numel():
        raise ValueError("the perplexity of a codebook needs at least 1 index; there are 0")
    shares = torch.bincount(indices.flatten(), minlength=codes).double() / indices.numel()
    return float(torch.special.entr(shares).sum().exp())
