"""Adaptive KL penalty of language-model fine-tuning by reward."""

from __future__ import annotations

from functools import partial

from adaptive_loss.knob import Limits, adaptive_kl
from adaptive_loss.weighting import weightings
from adaptive_loss.weighting._set_point import HeldTargets


@weightings.register("adaptive_kl")
class AdaptiveKL(HeldTargets):
    """Holds each term with a target by β ← β·(1 + clip(KL/τ − 1, ±0.2)·n/horizon).

    β is the term's weight (times its start weight, so give β₀ as start weight), KL its loss, τ its target, n the
    samples a step.

    Reference: Ziegler et al., "Fine-Tuning Language Models from Human Preferences", 2019.

    Choose it when a fine-tuned policy should stay a given KL away from the one it started from: start weight 0.2 and
    target 6 nats in the paper. It is slow by design. Metrics it logs: the weights. Deviations: the error is taken
    relative to |τ|, so that a negative target does not turn the law round; β stays within 10^±4 of its start.

    Args:
        n_terms: K.
        batch_size: n, samples (episodes) a step, 64 in the public code's defaults.
        horizon: samples over which an error of 1 would change β by a factor of about e.
        clip: greatest relative error that counts.
        limits: bounds and so on.

    Example:
        >>> import torch
        >>> from adaptive_loss import LossExecutor
        >>> executor = LossExecutor({"reward": 1.0, "kl": 0.2}, targets={"kl": 6.0}, weighting="adaptive_kl")
        >>> p = torch.nn.Parameter(torch.tensor(12.0))
        >>> executor({"reward": -p, "kl": p}).backward()
        >>> _ = executor.step(torch.optim.SGD([p], lr=0.0))
        >>> executor({"reward": -p, "kl": p}).backward()
        >>> round(executor.weights["kl"], 6)  # 0.2·(1 + 0.2·64/10000)
        0.200256
    """

    def __init__(
        self,
        n_terms: int,
        batch_size: int = 64,
        horizon: float = 10_000,
        clip: float = 0.2,
        limits: Limits = Limits((1e-4, 1e4)),
    ) -> None:
        if not (batch_size > 0 and horizon > 0 and clip > 0):
            raise ValueError("AdaptiveKL needs a positive batch_size, horizon and clip")
        super().__init__(n_terms, partial(adaptive_kl, share=batch_size / horizon, clip=clip), limits)

    def scale(self, start: float, target: float) -> float:
        """1/|τ|; a target of 0 has no relative error, so the least size that counts stands in."""
        return 1 / max(abs(target), 1e-12)
