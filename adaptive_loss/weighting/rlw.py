"""Random loss weighting."""

from __future__ import annotations

import torch
from torch import Tensor

from adaptive_loss.losses import Terms
from adaptive_loss.seeding import own_generator
from adaptive_loss.weighting import weightings
from adaptive_loss.weighting.base import Context, Weighting, ones


def rlw_weights(draw: Tensor) -> Tensor:
    """w = softmax(z), which sums to 1 (Lin et al. 2022, its normal form).

    Args:
        draw: z, [K] independent standard normal numbers.
    """
    return torch.softmax(draw, dim=0)


@weightings.register("rlw")
class RLW(Weighting):
    """w = softmax(z) with z ~ N(0, I) drawn anew every step: K weights that sum to 1 and know nothing.

    Reference: Lin, Ye, Zhang & Tsang, "Reasonable Effectiveness of Random Weighting: A Litmus Test for Multi-Task
    Learning", TMLR 2022.

    Choose it when you need the litmus test: a rule that does not beat random weights has learned nothing. Metrics it
    logs: the weights. Deviations: terms that are absent or off are left out of the softmax and show weight 1. One draw
    serves all batches of an accumulated step. The draws come from the rule's own generator, the same on every rank.

    Args:
        n_terms: K.

    Example:
        >>> import torch
        >>> from adaptive_loss import LossExecutor
        >>> executor = LossExecutor({"a": 1.0, "b": 1.0}, weighting="rlw", seed=1)
        >>> a, b = torch.tensor(2.0, requires_grad=True), torch.tensor(2.0, requires_grad=True)
        >>> round(executor({"a": a, "b": b}).item(), 6)
        2.0
    """

    jumps = True
    random: Tensor
    draw: Tensor

    def __init__(self, n_terms: int) -> None:
        super().__init__(n_terms)
        self.register_buffer("random", torch.empty(0, dtype=torch.uint8))
        self.register_buffer("draw", torch.empty(0, dtype=torch.float64))
        self._draw_next(own_generator(0, "rlw"))

    def bind(self, terms: Terms, seed: int) -> None:
        """Seed the draws, and draw for the first step."""
        super().bind(terms, seed)
        self._draw_next(own_generator(seed, "rlw"))

    def forward(self, losses: Tensor, context: Context) -> Tensor:
        """[K] this step's weights, drawn when the last step was accepted."""
        weights, present = ones(self.n_terms), ~torch.isnan(losses)
        weights[present] = rlw_weights(self.draw[present])
        return weights

    def after_step(self, losses: Tensor, context: Context) -> None:
        """Draw for the next step, so that a step that is rejected and tried again sees the same weights."""
        generator = torch.Generator()
        generator.set_state(self.random)
        self._draw_next(generator)

    def _draw_next(self, generator: torch.Generator) -> None:
        self.draw = torch.randn(self.n_terms, generator=generator, dtype=torch.float64)
        self.random = generator.get_state()
