"""Chains of rules: a product of weightings is a weighting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from adaptive_loss.events import Event
from adaptive_loss.losses import Terms
from adaptive_loss.weighting.base import Context, Weighting


class Product(Weighting):
    """wᵢ = ∏ⱼ wᵢ⁽ʲ⁾, the product of the weights that several rules give: ``Schedule(3) * GradNorm(3)``.

    Every part sees the same startᵢ·Lᵢ and the same gradients, so the order does not matter, and a schedule ramps what
    the other rule would give. A rule that learns its weights does so as if it were alone: a factor beside it would else
    be learned away, as its penalty balances the weights against the losses.

    Metrics it logs: the product.

    Args:
        parts: rules over the same K terms.

    Raises:
        ValueError: rules over different numbers of terms, or two with taps of their own.

    Example:
        >>> from adaptive_loss.weighting.dwa import DWA
        >>> from adaptive_loss.weighting.fixed import Fixed
        >>> (Fixed(2) * DWA(2) * Fixed(2)).needs
        ('epochs',)
    """

    def __init__(self, *parts: Weighting) -> None:
        super().__init__(parts[0].n_terms)
        whole = [inner for part in parts for inner in (part.rules if isinstance(part, Product) else (part,))]
        for part in whole:
            if part.n_terms != self.n_terms:
                raise ValueError(
                    f"{whole[0].name} is over {self.n_terms} terms and {part.name} over {part.n_terms}: "
                    "make both for the same terms"
                )
        self.parts = nn.ModuleList(whole)
        self.family = " × ".join(dict.fromkeys(part.family for part in whole))
        self.needs = tuple(dict.fromkeys(need for part in whole for need in part.needs))
        self.jumps = any(part.jumps for part in whole)
        self.holds_targets = any(part.holds_targets for part in whole)
        self.at = _one_tap([part.at for part in whole if part.at is not None])

    @property
    def name(self) -> str:
        """The parts' names."""
        return " * ".join(part.name for part in self.rules)

    @property
    def rules(self) -> tuple[Weighting, ...]:
        """The parts."""
        return tuple(part for part in self.parts if isinstance(part, Weighting))

    def bind(self, terms: Terms, seed: int) -> None:
        """Introduce every part."""
        super().bind(terms, seed)
        for part in self.rules:
            part.bind(terms, seed)

    def unmet(self, context: Context) -> str | None:
        """The first part's need that is not met."""
        return next((line for part in self.rules if (line := part.unmet(context)) is not None), None)

    def forward(self, losses: Tensor, context: Context) -> Tensor:
        """[K] the product, differentiable in what a part learns as that part alone is."""
        given = [part(losses, context).double() for part in self.rules]
        product = torch.stack([weights.detach() for weights in given]).prod(0)
        return sum((weights - weights.detach() for weights in given if weights.requires_grad), product)

    def saturated(self) -> Tensor | None:
        """[K] bool, where some part's weight stands at its bound."""
        found = [part for rule in self.rules if (part := rule.saturated()) is not None]
        return torch.stack(found).any(0) if found else None

    def unreached(self) -> Mapping[str, str]:
        """Those of every part."""
        return {name: reason for rule in self.rules for name, reason in rule.unreached().items()}

    def penalty(self, context: Context) -> Tensor | None:
        """The sum of the parts' penalties."""
        found = [part for rule in self.rules if (part := rule.penalty(context)) is not None]
        return torch.stack(found).sum() if found else None

    def let_through(self, weights: Tensor, context: Context) -> Tensor:
        """What every part lets through of the product."""
        for part in self.rules:
            weights = part.let_through(weights, context)
        return weights

    def after_step(self, losses: Tensor, context: Context) -> list[Event]:
        """Tell every part; all they have to report."""
        return [event for part in self.rules for event in part.after_step(losses, context) or ()]

    def end_epoch(self, metrics: Mapping[str, float]) -> None:
        """Tell every part."""
        for part in self.rules:
            part.end_epoch(metrics)


def _one_tap(taps: Sequence[Sequence[Tensor]]) -> Sequence[Tensor] | None:
    """The tensors at which all parts that name some take their gradients."""
    first = taps[0] if taps else None
    for at in taps[1:]:
        if first is None or [id(tensor) for tensor in at] != [id(tensor) for tensor in first]:
            raise ValueError("the parts take gradients at different tensors: give one tap, executor(losses, tap=...)")
    return first
