"""Objectives a user passes as ``probe``: what the weights are chosen by, measured on held-out data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Generator, Tensor, nn

from adaptive_loss.metrics.kid import LEAST, kernel_distance

Generate = Callable[[int, Generator], Tensor]
"""Number of samples, a generator to draw from → that many fresh samples, differentiable."""
Reconstruct = Callable[[Tensor, Generator], Tensor]
"""Held-out examples, a generator to draw from → their reconstructions, differentiable."""


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
        with evaluating(self.model):
            return self.loss_fn(*batch)

    def state_dict(self) -> dict[str, Any]:
        """Where the generator stands."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self.generator.set_state(state["generator"])


class sample_quality:
    """How unlike held-out data fresh samples look: their kernel distance in frozen features, 0 where they are alike.

    Every call draws ``batches`` times ``batch_size`` of the data and as many samples, and returns the mean of the
    unbiased :func:`~adaptive_loss.metrics.kid.kernel_distance` between their features; it may be negative. The
    gradient goes through the samples to whatever made them. Judge the result by other features than these.

    In an autoencoder fresh samples pass the decoder alone, so their quality has no gradient at the encoder, and a
    term that acts there, such as a VAE's KL, is out of sight. With ``reconstruct`` the way is taken in two legs that
    both networks move, d(samples, reconstructions) + λ·d(reconstructions, data); by the triangle inequality of the
    distance √d, 1 + 1/λ times their sum bounds d(samples, data) for every λ > 0. The greater λ, the less it takes
    reconstructions that resemble samples because both are blurred.

    Args:
        generate: ``generate(count, generator)`` → samples, like a batch of ``data`` in shape and scale. It draws all
            its noise from ``generator`` (on the CPU), e.g. ``torch.randn(count, 16, generator=generator)``.
        data: held-out examples [n, …].
        reconstruct: ``reconstruct(examples, generator)`` → their reconstructions, for an autoencoder; else None.
        fidelity: λ, how much the second leg counts; without ``reconstruct`` it is not used.
        features: samples → [N, D], frozen and differentiable, e.g. ``load_features("digits", "probe").features``.
        batch_size: samples a batch; fewer where there are fewer data.
        batches: batches a call; the more, the less noise.
        model: the module to put in eval mode meanwhile, or None.
        seed: of the generator.

    Raises:
        ValueError: fewer than 2 data or samples a batch, less than one batch, or a fidelity that is not above 0.

    Example:
        >>> generator = torch.nn.Linear(4, 2)
        >>> probe = sample_quality(
        ...     lambda count, rng: generator(torch.randn(count, 4, generator=rng)), torch.randn(100, 2), lambda x: x
        ... )
        >>> probe().requires_grad
        True
    """

    def __init__(
        self,
        generate: Generate,
        data: Tensor,
        features: Callable[[Tensor], Tensor],
        *,
        reconstruct: Reconstruct | None = None,
        fidelity: float = 1.0,
        batch_size: int = 64,
        batches: int = 4,
        model: nn.Module | None = None,
        seed: int = 0,
    ) -> None:
        self.batch_size = min(batch_size, len(data))
        if self.batch_size < LEAST:
            raise ValueError(f"sample quality needs {LEAST} held-out examples and samples, not {self.batch_size}")
        if batches < 1:
            raise ValueError(f"the probe's batches is {batches}; give at least 1")
        if not (math.isfinite(fidelity) and fidelity > 0):
            raise ValueError(f"the probe's fidelity is {fidelity}; give a finite number above 0")
        self.generate, self.reconstruct, self.features, self.fidelity = generate, reconstruct, features, fidelity
        self.data, self.model, self.batches = data, model, batches
        with torch.no_grad():
            self.reference = torch.cat([features(part) for part in data.split(batch_size)])
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self) -> Tensor:
        """The objective on fresh samples."""
        with evaluating(self.model):
            return torch.stack([self._distance() for _ in range(self.batches)]).mean()

    def _distance(self) -> Tensor:
        rows = torch.randperm(len(self.data), generator=self.generator)[: self.batch_size].to(self.data.device)
        samples = self.features(self.generate(self.batch_size, self.generator))
        if self.reconstruct is None:
            return kernel_distance(samples, self.reference[rows])
        # Other examples are compared with, so that being like one's own original counts for nothing.
        between = self.features(self.reconstruct(self.data[rows], self.generator))
        others = torch.randperm(len(self.data), generator=self.generator)[: self.batch_size].to(self.data.device)
        return kernel_distance(samples, between) + self.fidelity * kernel_distance(between, self.reference[others])

    def state_dict(self) -> dict[str, Any]:
        """Where the generator stands."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self.generator.set_state(state["generator"])


@contextmanager
def evaluating(model: nn.Module | None) -> Iterator[None]:
    """``model`` in eval mode, and each of its modules as before afterwards; nothing for None."""
    training = {} if model is None else {module: module.training for module in model.modules()}
    if model is not None:
        model.eval()
    try:
        yield
    finally:
        for module, was in training.items():
            module.training = was
