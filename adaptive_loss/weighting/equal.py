"""Equal weights: whatever the start weights, every term counts the same."""

from __future__ import annotations

import torch
from torch import Tensor

from adaptive_loss.weighting import weightings
from adaptive_loss.weighting.base import Context, Weighting


def equal_weights(start: Tensor) -> Tensor:
    """wᵢ = mean(start)/startᵢ, so that every applied weight startᵢ·wᵢ is the mean of the start weights. [K] → [K].

    Args:
        start: [K] start weights; those that are 0 are off: they do not count in the mean and get 1.

    Example:
        >>> equal_weights(torch.tensor([1.0, 4.0, 0.0, 1.0])).tolist()
        [2.0, 0.5, 1.0, 2.0]
    """
    on = start > 0
    return torch.where(on, start[on].mean() / start.where(on, torch.ones_like(start)), 1.0)


@weightings.register("equal")
class Equal(Weighting):
    """wᵢ = mean(start)/startᵢ: the applied weights are all the same and keep the start weights' sum.

    This is the one rule that undoes the start weights: it is the plain equal-weights baseline of the multi-task
    literature, at the same total weight. Where all start weights are equal it is ``fixed``.

    Reference: unitary scalarization in Kurin et al., "In Defense of the Unitary Scalarization for Deep Multi-Task
    Learning", NeurIPS 2022, which finds that with usual regularization it matches most rules.

    Choose it when you want to know what the start weights, or a rule, are worth over none at all. Metrics it logs: the
    weights. Deviations: the paper's weights are 1 each, here the mean of the start weights of the terms that
    are on, so that the learning rate need not change. The guards still hold: a term lifted above its start weight that
    takes more than ``Guards.share_cap`` of the total is lowered.

    Args:
        n_terms: K.

    Example:
        >>> import torch
        >>> from adaptive_loss import LossExecutor
        >>> executor = LossExecutor({"a": 1.0, "b": 3.0}, weighting="equal")
        >>> a, b = torch.tensor(1.0, requires_grad=True), torch.tensor(2.0, requires_grad=True)
        >>> executor({"a": a, "b": b}).item(), executor.weights
        (6.0, {'a': 2.0, 'b': 2.0})
    """

    def forward(self, losses: Tensor, context: Context) -> Tensor:
        """[K] weights, the same every step."""
        return equal_weights(context.start)
