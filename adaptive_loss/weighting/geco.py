"""GECO: a multiplier that rises while a constraint is broken."""

from __future__ import annotations

from functools import partial

from adaptive_loss.knob import Limits, geco
from adaptive_loss.weighting import weightings
from adaptive_loss.weighting._set_point import HeldTargets


@weightings.register("geco")
class GECO(HeldTargets):
    """Holds each term with a target by λ ← λ·exp(clip(s·EMA(C), ±limit)), C = L − τ.

    λ is the term's weight (times its start weight), C > 0 where its loss L is above its target τ, s the speed. With
    the reconstruction under a target κ², the total is Rezende & Viola's KL + λ·(rec − κ²) but for a constant.

    Reference: Rezende & Viola, "Taming VAEs", 2018.

    Choose it when you know how good the reconstruction must be and want the smallest KL that allows it. Metrics it
    logs: the weights. Deviations: the paper leaves s open, here 0.01 with the step clipped at 0.1 nats (one public code
    clips to a factor in [0.9, 1.1] every 100 steps); C is startᵢ·(Lᵢ − τᵢ), the paper's where the start weight is 1;
    λ stays within 10^±4, and an alarm sounds where it stands there for long.

    Args:
        n_terms: K.
        speed: s, per step and unit of C. Losses in the thousands want it smaller.
        decay: of the average of C, 0.99 in the paper.
        limit: greatest change of log λ in one step, in nats.
        limits: bounds and so on.

    Example:
        >>> import torch
        >>> from adaptive_loss import LossExecutor
        >>> from adaptive_loss.weighting.geco import GECO
        >>> weighting = GECO(2, speed=0.1)
        >>> executor = LossExecutor({"rec": 1.0, "kl": 1.0}, targets={"rec": 2.0}, weighting=weighting)
        >>> p = torch.nn.Parameter(torch.tensor(5.0))
        >>> executor({"rec": p**2, "kl": p}).backward()
        >>> _ = executor.step(torch.optim.SGD([p], lr=0.0))
        >>> executor({"rec": p**2, "kl": p}).backward()  # C = 23 is far above 0: λ = exp(0.1)
        >>> executor.weights
        {'rec': 1.1051709180756477, 'kl': 1.0}
    """

    def __init__(
        self,
        n_terms: int,
        speed: float = 0.01,
        decay: float = 0.99,
        limit: float = 0.1,
        limits: Limits = Limits((1e-4, 1e4)),
    ) -> None:
        if not (speed > 0 and 0 < limit <= 50):
            raise ValueError(f"GECO got speed {speed} and limit {limit}: give a positive speed and 0 < limit ≤ 50 nats")
        super().__init__(n_terms, partial(geco, speed=speed, limit=limit), limits, decay=decay)
