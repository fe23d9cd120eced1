"""Stop or decay of a term that no longer helps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from adaptive_loss.events import Event
from adaptive_loss.losses import Terms
from adaptive_loss.weighting import weightings
from adaptive_loss.weighting.base import Context, Weighting, ones

_DECAY = 0.9


@weightings.register("wind_down")
class WindDown(Weighting):
    """Lowers one term when its gradient opposes the base's, or when the select metric stalls.

    wᵢ starts at 1 and is multiplied by ``decay`` whenever c, the running mean (decay 0.9) of cos(gᵢ, g_base) at the
    tap, has been below 0 for ``opposed`` steps in a row, and whenever ``metric`` has not improved for ``stall`` epochs
    in a row; both counts then begin anew. ``decay=0`` stops it for good.

    Reference: Du et al., "Adapting Auxiliary Losses Using Gradient Similarity", 2018, for the cosine; early stopping of
    an auxiliary by a validation metric is common practice.

    Choose it when an auxiliary helps early and harms late, as alignment and distillation terms do. Metrics it logs: the
    weights, and an event each time. Deviations: the paper gates every step by the sign of one batch's cosine (rule
    ``cosine_gate``); here a running mean must stay negative, and the change lasts.

    Args:
        n_terms: K.
        term: the name of the term.
        opposed: steps in a row with c < 0; needs a tap and a base. None: gradients are not looked at.
        stall: epochs in a row without a better ``metric``; needs ``end_epoch(select_loss=...)``. None: not looked at.
        decay: the factor, in [0, 1).
        metric: what ``end_epoch`` is given, ``select_loss`` (lower is better) or ``select_accuracy`` (higher is).

    Raises:
        ValueError: a number that cannot be.
        KeyError: at the executor's construction, a term that is not there.

    Example:
        >>> import torch
        >>> from adaptive_loss import LossExecutor
        >>> from adaptive_loss.weighting.wind_down import WindDown
        >>> rule = WindDown(2, "kd", stall=1, decay=0.5)
        >>> executor = LossExecutor({"ce": 1.0, "kd": 1.0}, base="ce", weighting=rule)
        >>> w = torch.nn.Parameter(torch.tensor(1.0))
        >>> optimizer = torch.optim.SGD([w], lr=0.0)
        >>> for loss in (0.9, 0.8, 0.8, 0.8, 0.8):
        ...     executor({"ce": w**2, "kd": w}).backward()
        ...     weight = executor.step(optimizer).weights["kd"]
        ...     executor.end_epoch(select_loss=loss)
        >>> weight, rule.factor.item()
        (0.5, 0.25)
    """

    family = "switch"
    needs = ("a term", "a sign")
    factor: Tensor
    cosine: Tensor
    counts: Tensor
    best: Tensor

    def __init__(
        self,
        n_terms: int,
        term: str | None = None,
        *,
        opposed: int | None = None,
        stall: int | None = None,
        decay: float = 0.5,
        metric: str = "select_loss",
    ) -> None:
        super().__init__(n_terms)
        if not 0 <= decay < 1:
            raise ValueError(f"WindDown's decay is {decay}: give a factor of at least 0 and below 1")
        if any(count is not None and count < 1 for count in (opposed, stall)):
            raise ValueError(f"WindDown's opposed {opposed} and stall {stall} must be at least 1, or None")
        if metric not in ("select_loss", "select_accuracy"):
            raise ValueError(f"WindDown's metric is {metric!r}: choose select_loss or select_accuracy")
        self.term, self.opposed, self.stall, self.decay, self.metric = term, opposed, stall, decay, metric
        looks, waits = ("gradients", "base") if opposed is not None else (), ("epochs",) if stall is not None else ()
        self.needs = ("a term", *looks, *waits)
        self.seen: float | None = None
        self.register_buffer("factor", torch.ones((), dtype=torch.float64))
        self.register_buffer("cosine", torch.zeros(2, dtype=torch.float64))  # running sum and its weight
        self.register_buffer("counts", torch.zeros(2, dtype=torch.int64))  # steps opposed, epochs stalled
        self.register_buffer("best", torch.tensor(math.inf, dtype=torch.float64))

    def bind(self, terms: Terms, seed: int) -> None:
        """Find the term."""
        super().bind(terms, seed)
        if self.term is not None and self.term not in terms.names:
            raise KeyError(f"WindDown's term {self.term!r} is not a term; the terms are: {', '.join(terms.names)}")

    def unmet(self, context: Context) -> str | None:
        """The term and the sign to look for, where it was made without."""
        if self.term is None or (self.opposed is None and self.stall is None):
            how = "make it with WindDown(n_terms, term, opposed=steps), or stall=epochs"
            return f"weighting 'wind_down' needs a term and a sign: {how}"
        return super().unmet(context)

    def forward(self, losses: Tensor, context: Context) -> Tensor:
        """[K] ones, but for the term."""
        assert self.term is not None
        i = self.terms.names.index(self.term)
        if context.first:
            self.seen = self._cosine(context, i)
        weights = ones(self.n_terms)
        weights[i] = self.factor
        return weights

    def _cosine(self, context: Context, i: int) -> float | None:
        """cos(gᵢ, g_base) of this batch, or None where one of the two is absent, 0 or not finite."""
        base = self.terms.base_index
        if self.opposed is None or context.gradients is None or base is None or not context.present[[i, base]].all():
            return None
        norms, cosine = context.gradients.norms[[i, base]], float(context.gradients.cosines[i, base])
        return cosine if bool((norms > 0).all()) and math.isfinite(cosine) else None

    def after_step(self, losses: Tensor, context: Context) -> Sequence[Event]:
        """Count steps of opposition, and lower the term where one of the counts is full."""
        counts = self.counts.clone()
        if self.seen is not None:
            sample = torch.tensor([self.seen, 1.0], dtype=torch.float64)
            self.cosine = _DECAY * self.cosine + (1 - _DECAY) * sample
            counts[0] = counts[0] + 1 if float(self.cosine[0]) < 0 else 0
        why = None
        if self.opposed is not None and counts[0] >= self.opposed:
            why, counts[0] = f"opposed the base for {self.opposed} steps", 0
        elif self.stall is not None and counts[1] >= self.stall:
            why, counts[1] = f"{self.metric} stalled for {self.stall} epochs", 0
        self.counts = counts
        return () if why is None else [self._lower(context, why)]

    def _lower(self, context: Context, why: str) -> Event:
        before, self.factor = float(self.factor), self.factor * self.decay
        details = {"term": self.term, "before": before, "after": float(self.factor)}
        return Event(context.step, "switch", f"{self.term!r} is lowered: {why}", details)

    def end_epoch(self, metrics: Mapping[str, float]) -> None:
        """Compare the metric with its best; one that is not given or not finite is left out."""
        value = float(metrics.get(self.metric, math.nan))
        if not math.isfinite(value):
            return
        value = -value if self.metric == "select_accuracy" else value
        better = value < float(self.best)
        self.best = torch.minimum(self.best, torch.tensor(value, dtype=torch.float64))
        self.counts = self.counts.clone()
        self.counts[1] = 0 if better else self.counts[1] + 1
