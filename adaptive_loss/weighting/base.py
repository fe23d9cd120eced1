"""What a weighting rule is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adaptive_loss.signals import Signals


@dataclass(frozen=True)
class Context:
    """What a rule or modulator may look at besides the losses.

    Args:
        step: accepted optimizer steps so far.
        present: [K] bool, the terms that are there this step and on at all.
        signals: the shared running statistics.
        weights: [K] the weights applied this step, in the user's units.
        start: [K] the start weights.
        looked: whether this step brought a new look-ahead.
        objective: gives the probe's value on fresh held-out data; None without a probe.
    """

    step: int
    present: Tensor
    signals: Signals
    weights: Tensor
    start: Tensor
    looked: bool = False
    objective: Callable[[], float] | None = None


class Weighting(nn.Module, ABC):
    """A rule that gives K terms their weights.

    A rule sees startᵢ·Lᵢ, so start weights mean what the user thinks under every rule, and its weights multiply the
    start weights. Buffers are allocated in ``__init__`` and never None, so that ``state_dict`` carries all state.

    Args:
        n_terms: K.
    """

    def __init__(self, n_terms: int) -> None:
        super().__init__()
        self.n_terms = n_terms

    @abstractmethod
    def forward(self, losses: Tensor, context: Context) -> Tensor:
        """The weights, [K] float64, detached unless the rule learns them.

        Args:
            losses: [K] float64 values of startᵢ·Lᵢ, NaN where a term is absent or off.
            context: what else there is to see.
        """

    def penalty(self, context: Context) -> Tensor | None:
        """What the rule adds to the total (½Σs for uncertainty weighting), or None."""
        return None

    def after_step(self, losses: Tensor, context: Context) -> None:
        """Called once an accepted optimizer step, with the same losses."""

    def end_epoch(self, metrics: Mapping[str, float]) -> None:
        """Called at the end of an epoch, where the user says so."""


def ones(n_terms: int) -> Tensor:
    """[K] weights of 1."""
    return torch.ones(n_terms, dtype=torch.float64)
