"""What an adaptive optimizer remembers of the gradients' size, brought along when the weights change by much."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

_SQUARES = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum")


def rescale_memory(optimizer: Optimizer, parameters: Sequence[Tensor], ratio: float) -> None:
    """Make the optimizer's state what it would be had all gradients so far been ``ratio`` times as long.

    Adam divides by √v̂, a mean of squares over about a thousand steps (β₂ = 0.999). A constant factor on the loss
    cancels in it, but one that changes does not: where a term's weight was a hundred times too high for the first five
    steps, v̂ remembers it, and every later step is far too short. With v ← r²·v and m ← r·m the steps are as long as
    if the weights had been right from the start. An optimizer without second moments (SGD) is left alone: there the
    length of the gradient is the length of the step.

    Args:
        optimizer: whose state is rescaled in place.
        parameters: of which it is.
        ratio: r > 0.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor(1.0))
        >>> optimizer = torch.optim.Adam([w])
        >>> (10 * w).backward()
        >>> optimizer.step()
        >>> rescale_memory(optimizer, [w], 0.1)
        >>> round(optimizer.state[w]["exp_avg_sq"].item(), 6)  # (1 − β₂)·1²
        0.001
    """
    with torch.no_grad():
        for parameter in parameters:
            state = optimizer.state.get(parameter, {})
            squares = [state[name] for name in _SQUARES if isinstance(state.get(name), Tensor)]
            for square in squares:
                square.mul_(ratio * ratio)
            if squares and "exp_avg" in state:
                state["exp_avg"].mul_(ratio)
