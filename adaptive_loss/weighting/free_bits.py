"""Free bits: the first nats of a KL cost nothing."""

from __future__ import annotations

from torch import Tensor

from adaptive_loss.weighting import weightings
from adaptive_loss.weighting.base import Context, Weighting, ones


def free_bits(kl_per_dimension: Tensor, floor: float) -> Tensor:
    """Σⱼ max(λ, KLⱼ) over the last dimension (Kingma et al. 2016).

    This is the method itself, for the vector before it becomes a term. The paper averages each KLⱼ over the batch
    first, so give [D] means; on [B, D] the floor applies to each example, which is stricter.

    Args:
        kl_per_dimension: [..., D] in nats.
        floor: λ, nats that are free in each dimension (or group of dimensions).

    Example:
        >>> import torch
        >>> free_bits(torch.tensor([0.1, 2.0]), 0.5)
        tensor(2.5000)
    """
    return kl_per_dimension.clamp_min(floor).sum(-1)


@weightings.register("free_bits")
class FreeBits(Weighting):
    """Switches each term with a target λ off while its loss is at or below it: wᵢ = 1 if Lᵢ > λᵢ, else 0.

    That has the gradient of max(λᵢ, Lᵢ), the free bits of a scalar.

    Reference: Kingma et al., "Improved Variational Inference with Inverse Autoregressive Flow", NeurIPS 2016.

    Choose it when all you have is the whole KL and a model that collapses it to 0; where you have the KL a dimension,
    call :func:`free_bits` on it and weigh the result by another rule. Metrics it logs: the weights. Deviations: the
    paper's floor holds in every group of dimensions, here for the whole term, so single dimensions may still collapse;
    the total lacks the constant λᵢ while the term is off.

    Args:
        n_terms: K.

    Example:
        >>> import torch
        >>> from adaptive_loss import LossExecutor
        >>> executor = LossExecutor({"rec": 1.0, "kl": 0.5}, targets={"kl": 3.0}, weighting="free_bits")
        >>> p = torch.nn.Parameter(torch.tensor(4.0))
        >>> executor({"rec": p**2, "kl": p}).item()
        18.0
        >>> _ = executor.step(torch.optim.SGD([p], lr=0.0))
        >>> executor({"rec": p**2, "kl": p / 2}).item()  # 2 nats are free
        16.0
    """

    family = "set-point"
    needs = ("targets",)
    holds_targets = True
    jumps = True

    def forward(self, losses: Tensor, context: Context) -> Tensor:
        """[K] 0 for a term with a target that is at or below it, else 1, absent terms included."""
        weights = ones(self.n_terms)
        for name, target in self.terms.targets.items():
            i = self.terms.names.index(name)
            if losses[i] <= target * context.start[i]:
                weights[i] = 0.0
        return weights
