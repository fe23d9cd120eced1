"""Objectives a user passes as ``probe``: what the weights are chosen by, measured on held-out data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class held_out:
    """A loss on batches of held-out data, drawn by a generator of its own.

    Every call draws ``batch_size`` of the n examples without replacement and returns ``loss_fn(*batch)``. While it
    runs, ``model`` is in eval mode (batch normalisation then neither uses nor moves batch statistics).

    Args:
        loss_fn: batch → differentiable 0-dim tensor, e.g. ``lambda x, y: F.cross_entropy(model(x), y)``.
        data: a tensor, or several with the same length n, such as ``(images, labels)``.
        batch_size: examples a call; a quarter of a training batch is enough.
        model: the module to put in eval mode meanwhile, or None.
        seed: of the generator.

    Raises:
        ValueError: no data, tensors of different lengths, or a batch size below 1.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1)
        >>> probe = held_out(lambda x, y: (model(x) - y).square().mean(), (torch.randn(8, 2), torch.randn(8, 1)))
        >>> probe().requires_grad
        True
    """

    def __init__(
        self,
        loss_fn: Callable[..., Tensor],
        data: Tensor | Sequence[Tensor],
        *,
        batch_size: int = 64,
        model: nn.Module | None = None,
        seed: int = 0,
    ) -> None:
        self.data = (data,) if isinstance(data, Tensor) else tuple(data)
        lengths = {len(part) for part in self.data}
        if len(lengths) != 1 or 0 in lengths:
            raise ValueError(f"the probe's data have lengths {sorted(lengths)}: give tensors of one length above 0")
        if batch_size < 1:
            raise ValueError(f"the probe's batch_size is {batch_size}: give a positive number of examples")
        self.loss_fn, self.model = loss_fn, model
        self.batch_size = min(batch_size, len(self.data[0]))
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self) -> Tensor:
        """The objective on a fresh batch."""
        rows = torch.randperm(len(self.data[0]), generator=self.generator)[: self.batch_size]
        batch = [part[rows.to(part.device)] for part in self.data]
        if self.model is None:
            return self.loss_fn(*batch)
        training = {module: module.training for module in self.model.modules()}
        self.model.eval()
        try:
            return self.loss_fn(*batch)
        finally:
            for module, was in training.items():
                module.training = was

    def state_dict(self) -> dict[str, Any]:
        """Where the generator stands."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self.generator.set_state(state["generator"])
