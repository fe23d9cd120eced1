"""ControlVAE: a PI controller on the weight."""

from __future__ import annotations

from functools import partial

from adaptive_loss.knob import Limits, pi
from adaptive_loss.weighting import weightings
from adaptive_loss.weighting._set_point import HeldTargets


@weightings.register("pi")
class PI(HeldTargets):
    """Holds each term with a target by β = Kp/(1 + exp(e)) − Ki·Σe within [0, 1], e = τ − L.

    β is the term's weight (times its start weight), L its loss (the KL), τ its target; the sum runs over the steps.
    Below its target β is near 0, so a KL can grow first; above it β rises until the KL stays.

    Reference: Shao et al., "ControlVAE: Controllable Variational Autoencoder", ICML 2020, algorithm 1.

    Choose it when the KL should end at a given number of nats, or collapses to 0 under a fixed weight. Metrics it logs:
    the weights. Deviations: the sum stops growing where β is at a bound and the error pushes further out, and shrinks
    at once when it turns round (public code's test ``W < 0 and W >= 1`` is never true, the paper's stops it both ways);
    β acts from the step after its observation; e is startᵢ·(τᵢ − Lᵢ), the paper's where the start weight is 1.

    Args:
        n_terms: K.
        proportional: Kp.
        integral: Ki > 0 (−Ki in public code).
        value: where β starts.
        limits: bounds and so on.

    Example:
        >>> import torch
        >>> from adaptive_loss import LossExecutor
        >>> executor = LossExecutor({"rec": 1.0, "kl": 1.0}, targets={"kl": 8.0}, weighting="pi")
        >>> p = torch.nn.Parameter(torch.tensor(10.0))
        >>> executor({"rec": -p, "kl": p}).backward()
        >>> _ = executor.step(torch.optim.SGD([p], lr=0.0))
        >>> executor({"rec": -p, "kl": p}).backward()
        >>> round(executor.weights["kl"], 6)  # 0.01/(1 + exp(-2)) + 0.0001·2
        0.009008
    """

    jumps = True

    def __init__(
        self,
        n_terms: int,
        proportional: float = 0.01,
        integral: float = 1e-4,
        value: float = 0.0,
        limits: Limits = Limits((0.0, 1.0)),
    ) -> None:
        if not (proportional >= 0 and integral >= 0):
            raise ValueError(f"PI got gains {proportional} and {integral}: give numbers of at least 0")
        law = partial(pi, proportional=proportional, integral_gain=integral)
        # The integral starts there too, so that a value above 0 is held and not dropped.
        super().__init__(n_terms, law, limits, value=value, integral=value)
