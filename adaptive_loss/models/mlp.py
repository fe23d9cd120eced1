"""A multilayer perceptron with tanh units, smooth enough to be differentiated twice in its inputs."""

from __future__ import annotations

import itertools

from torch import Tensor, nn

from adaptive_loss.models import models


@models.register("mlp")
class MLP(nn.Module):
    """``depth`` hidden layers of tanh units, then a linear one; Xavier-normal weights (Glorot & Bengio 2010), biases 0.

    Args:
        inputs, outputs: sizes of a point and of what is predicted there.
        width: units of a hidden layer.
        depth: hidden layers, at least 1.

    Example:
        >>> import torch
        >>> MLP(2, 1)(torch.rand(5, 2)).shape
        torch.Size([5, 1])
    """

    def __init__(self, inputs: int, outputs: int, width: int = 50, depth: int = 3) -> None:
        super().__init__()
        sizes = [inputs, *[width] * depth]
        hidden = [layer for a, b in itertools.pairwise(sizes) for layer in (nn.Linear(a, b), nn.Tanh())]
        self.layers = nn.Sequential(*hidden, nn.Linear(width, outputs))
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_normal_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, points: Tensor) -> Tensor:
        """[N, inputs] → [N, outputs]."""
        return self.layers(points)
