"""VQGAN's adaptive weight: an auxiliary pushes about as hard as the base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from adaptive_loss.weighting import weightings
from adaptive_loss.weighting.base import Context
from adaptive_loss.weighting.gradient_rule import AgainstBase, known_norms

_EPS, _CAP = 1e-4, 1e4


def adaptive_weights(base: Tensor, norms: Tensor, weight: float) -> Tensor:
    """λᵢ = clamp(n_b/(nᵢ + 1e−4), 0, 1e4)·d (Esser, Rombach & Ommer 2021, eq. 7; bounds as in their code).

    Args:
        base: n_b, the norm of the base term's gradient, a scalar.
        norms: n, [K] norms of the auxiliaries' gradients.
        weight: d.

    Example:
        >>> adaptive_weights(torch.tensor(2.0), torch.tensor([0.5, 1e-9]), 0.8)
        tensor([3.1994e+00, 8.0000e+03])
    """
    return (base / (norms + _EPS)).clamp(0, _CAP) * weight


@weightings.register("vqgan")
class VQGAN(AgainstBase):
    """Gives an auxiliary the weight λᵢ = clamp(‖g_base‖/(‖gᵢ‖ + 1e−4), 0, 1e4)·d: d of the base's push.

    gᵢ is the gradient of startᵢ·Lᵢ at the tap, which in the paper is the decoder's last layer. λ is told anew at every
    refresh and may leap.

    Reference: Esser, Rombach & Ommer, "Taming Transformers for High-Resolution Image Synthesis", CVPR 2021.

    Choose it when an adversarial loss joins a reconstruction loss; name it in ``only`` where there are other terms.
    Metrics it logs: the weights. Deviations: an auxiliary whose gradient is exactly 0, such as an adversarial term that
    is not switched on yet, keeps its weight instead of running to the cap, and so do all where the base is absent or
    its gradient is 0. Norms are taken in float32, so that short half-precision gradients do not vanish.

    Args:
        n_terms: K.
        weight: d, .8 in the paper's configurations (.5 for latent diffusion's KL autoencoders).
        only: names of the terms to weigh; None for every auxiliary.
        at, every: as for :class:`~adaptive_loss.weighting.gradient_rule.GradientRule`.

    Raises:
        ValueError: a weight that is not positive and finite.

    Example:
        >>> import torch
        >>> from adaptive_loss import LossExecutor
        >>> last = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> executor = LossExecutor({"rec": 1.0, "adv": 1.0}, base="rec", weighting="vqgan")
        >>> total = executor({"rec": 4 * last[0], "adv": 2 * last[1]}, tap=last)
        >>> {name: round(weight, 3) for name, weight in executor.weights.items()}
        {'rec': 1.0, 'adv': 1.6}
    """

    jumps = True

    def __init__(
        self,
        n_terms: int,
        weight: float = 0.8,
        *,
        only: Sequence[str] | None = None,
        at: Tensor | Sequence[Tensor] | None = None,
        every: int = 1,
    ) -> None:
        super().__init__(n_terms, only=only, at=at, every=every)
        if not 0 < weight < float("inf"):
            raise ValueError(f"VQGAN's weight is {weight}: give a positive number")
        self.weight = weight

    def saturated(self) -> Tensor:
        """[K] bool, λᵢ at its cap."""
        return self.held >= _CAP * self.weight

    def observe(self, losses: Tensor, context: Context) -> Mapping[str, Tensor]:
        """λ of the auxiliaries that are there."""
        norms = known_norms(context)
        base = norms[self.base()]
        if not base > 0:
            return {}
        return {"held": torch.where(self.weighed & (norms > 0), adaptive_weights(base, norms, self.weight), self.held)}
