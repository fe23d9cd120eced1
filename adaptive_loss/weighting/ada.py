"""Adaptive discriminator augmentation: the overfitting heuristic as a knob."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from adaptive_loss.events import Event
from adaptive_loss.knob import Knob, Limits, Saturation, ada, reported
from adaptive_loss.weighting import weightings
from adaptive_loss.weighting.base import Context, Weighting, ones

_SILENT = "weighting 'ada' needs observations: none had come by step {}; call observe(E[sign D(real)]) before step()"


@weightings.register("ada")
class ADA(Weighting):
    """Turns a probability, not the weights: p += sign(r − 0.6)·(B·4)/500k every 4 observations, r = E[sign D(real)].

    D is the discriminator, B the batch size: p can go from 0 to 1 over 500k real images. r is near 1 where the
    discriminator tells its training images by heart. The weights stay 1.

    Reference: Karras et al., "Training Generative Adversarial Networks with Limited Data", NeurIPS 2020.

    Choose it when a GAN has few images: read ``probability`` (or take ``on_change``) as the strength of the
    augmentation. Call ``observe(r)`` before ``executor.step()``; a rejected step's observation is not counted once
    the next has come. Metrics it logs: the weights (1) and, where you log it, ``probability``. Deviations: p is capped
    at 1 (public code: at 0 only). The caller's number moves in shadow mode too.

    Args:
        n_terms: K.
        batch_size: B, real images a step.
        target: of r.
        interval: observations averaged before each move.
        images: real images over which p can go from 0 to 1.
        probability: where p starts.
        limits: bounds and so on; 0 is p's place of rest, so no alarm sounds there.
        on_change: called with every new p.

    Example:
        >>> from adaptive_loss import LossExecutor
        >>> from adaptive_loss.weighting.ada import ADA
        >>> weighting = ADA(1, batch_size=50, interval=1)
        >>> executor = LossExecutor({"discriminator": 1.0}, weighting=weighting)
        >>> import torch
        >>> p = torch.nn.Parameter(torch.tensor(1.0))
        >>> executor({"discriminator": p**2}).backward()
        >>> weighting.observe(0.9)
        >>> _ = executor.step(torch.optim.SGD([p], lr=0.0))
        >>> weighting.probability  # 50/500_000
        0.0001
    """

    family = "set-point"
    needs = ("observations",)

    def __init__(
        self,
        n_terms: int,
        batch_size: int = 64,
        target: float = 0.6,
        interval: int = 4,
        images: float = 500_000,
        probability: float = 0.0,
        limits: Limits = Limits((0.0, 1.0), rest=0.0),
        on_change: Callable[[float], None] | None = None,
    ) -> None:
        super().__init__(n_terms)
        if not (batch_size > 0 and interval >= 1 and images > 0):
            raise ValueError("ADA needs a positive batch_size, interval and number of images")
        self.interval = interval
        law = partial(ada, rate=batch_size * interval / images)
        self.alarms: list[Saturation] = []
        self.knob = Knob(
            law,
            target=target,
            value=probability,
            name=f"weighting {self.name!r}: the probability",
            limits=limits,
            on_change=on_change,
            on_alarm=self.alarms.append,
        )
        self.pending, self.total, self.count = math.nan, 0.0, 0

    @property
    def probability(self) -> float:
        """p, the augmentation's probability."""
        return self.knob.value

    def observe(self, value: float | Tensor) -> None:
        """Say this step's r = E[sign D(real)], in [−1, 1]; it counts once the step is accepted."""
        self.pending = float(value)

    def forward(self, losses: Tensor, context: Context) -> Tensor:
        """[K] ones."""
        return ones(self.n_terms)

    def after_step(self, losses: Tensor, context: Context) -> Sequence[Event]:
        """Count the observation; move p when there are enough. One that is not finite is none; none at all is told."""
        value, self.pending = self.pending, math.nan
        if not math.isfinite(value):
            if context.step == self.interval and self.knob.seen == self.count == 0:
                warnings.warn(f"adaptive_loss: {_SILENT.format(self.interval)}", stacklevel=2)
            return []
        self.total, self.count = self.total + value, self.count + 1
        if self.count == self.interval:
            self.knob.observe(self.total / self.count)
            self.total, self.count = 0.0, 0
        return reported(self.alarms, context.step)

    def get_extra_state(self) -> dict[str, Any]:
        """Everything, as numbers."""
        return {"knob": self.knob.state_dict(), "pending": self.pending, "total": self.total, "count": self.count}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`get_extra_state`."""
        self.knob.load_state_dict(state["knob"])
        self.pending, self.total, self.count = state["pending"], state["total"], state["count"]
