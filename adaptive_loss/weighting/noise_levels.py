"""Loss weights as functions of the noise level, for diffusion models: the maths, and what their rules share.

The functions take and return tensors of any shape, so they weigh per-sample losses directly. The rules weigh K
terms, one a bucket of noise levels.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from adaptive_loss.weighting.base import Context, Weighting

Prediction = Literal["epsilon", "x0", "v"]


def min_snr(snr: Tensor, gamma: float = 5.0, prediction: Prediction = "epsilon") -> Tensor:
    """Min-SNR-γ: min(SNR, γ) for a model that predicts x₀, over SNR for ε, over SNR + 1 for v (Hang et al. 2023).

    Args:
        snr: signal-to-noise ratios ᾱ/(1 − ᾱ), at least 0; ε at SNR 0 weighs 1, the limit.
        gamma: γ, 5 in the paper.
        prediction: what the model predicts, whose squared error is weighed.

    Example:
        >>> min_snr(torch.tensor([0.0, 1.0, 10.0]))
        tensor([1.0000, 1.0000, 0.5000])
    """
    clipped = snr.clamp_max(gamma)
    if prediction == "x0":
        return clipped
    if prediction == "v":
        return clipped / (snr + 1)
    return torch.where(snr > 0, clipped / snr, 1.0)


def p2(snr: Tensor, k: float = 1.0, gamma: float = 1.0, prediction: Prediction = "epsilon") -> Tensor:
    """P2: (k + SNR)^−γ on the squared error of ε (Choi et al. 2022); γ is ½ or 1 in the paper.

    Args:
        snr: signal-to-noise ratios, at least 0.
        k, gamma: k > 0 and γ.
        prediction: what the model predicts, whose squared error is weighed.

    Example:
        >>> p2(torch.tensor([0.0, 3.0]), gamma=0.5)
        tensor([1.0000, 0.5000])
    """
    return of_epsilon((k + snr) ** -gamma, snr, prediction)


def debiased(snr: Tensor, floor: float = 1e-6, prediction: Prediction = "epsilon") -> Tensor:
    """Debiased estimation: SNR^−½ on the squared error of ε (Yu et al. 2023).

    Args:
        snr: signal-to-noise ratios.
        floor: least SNR; pure noise (SNR 0) has no finite weight in the paper.
        prediction: what the model predicts, whose squared error is weighed.

    Example:
        >>> debiased(torch.tensor([0.25, 4.0]))
        tensor([2.0000, 0.5000])
    """
    return of_epsilon(snr.clamp_min(floor) ** -0.5, snr, prediction)


def of_epsilon(weights: Tensor, snr: Tensor, prediction: Prediction) -> Tensor:
    """What a weight on the squared error of ε is on that of ``prediction``: ‖Δε‖² = SNR·‖Δx₀‖² = SNR/(SNR + 1)·‖Δv‖².

    Example:
        >>> of_epsilon(torch.ones(2), torch.tensor([0.25, 4.0]), "x0")
        tensor([0.2500, 4.0000])
    """
    if prediction == "x0":
        return weights * snr
    return weights * snr / (snr + 1) if prediction == "v" else weights


def edm(sigma: Tensor, sigma_data: float = 0.5) -> Tensor:
    """EDM: λ(σ) = (σ² + σd²)/(σ·σd)² on the squared error of the denoised image (Karras et al. 2022, table 1).

    Args:
        sigma: noise's standard deviations σ > 0.
        sigma_data: σd, the data's standard deviation.

    Example:
        >>> edm(torch.tensor([0.5, 1.0]))
        tensor([8., 5.])
    """
    # The same as the quotient, but the squares of small levels do not underflow in it.
    return sigma_data**-2 + sigma**-2


class NoiseLevels(Weighting):
    """K terms, one a bucket of noise levels, each weighed by its level alone; nothing is normalised.

    Args:
        n_terms: K.
        levels: K noise levels in term order, in ``unit``; without them the rule says what it needs.

    Raises:
        ValueError: another number of levels, or one that is negative, not finite, or 0 where that is no level.
    """

    family = "noise levels"
    needs = ("signal-to-noise ratios",)
    unit: ClassVar[str] = "SNR"
    levels: Tensor

    def __init__(self, n_terms: int, levels: Sequence[float] | Tensor | None = None) -> None:
        super().__init__(n_terms)
        values = torch.full((n_terms,), torch.nan, dtype=torch.float64)
        if levels is not None:
            values = torch.as_tensor(levels, dtype=torch.float64).clone()
            least = 0.0 if self.unit == "SNR" else torch.finfo(torch.float32).tiny
            if values.shape != (n_terms,) or not torch.isfinite(values).all() or (values < least).any():
                above = "at least 0" if self.unit == "SNR" else "above 0"
                raise ValueError(f"{type(self).__name__} got levels {levels}: give {n_terms} finite numbers {above}")
        self.register_buffer("levels", values)

    def unmet(self, context: Context) -> str | None:
        """The levels, where it was made without."""
        if not torch.isnan(self.levels).any():
            return None
        return f"weighting {self.name!r} needs noise levels: make it with levels=[...], one {self.unit} a term"

    @abstractmethod
    def weigh(self, levels: Tensor) -> Tensor:
        """The weights of noise levels, elementwise."""

    def forward(self, losses: Tensor, context: Context) -> Tensor:
        """[K] the levels' weights, the same at every step."""
        return self.weigh(self.levels)


def checked(prediction: Prediction) -> Prediction:
    """``prediction``, if it is one."""
    if prediction not in get_args(Prediction):
        raise ValueError(f"the prediction is {prediction!r}: choose from {', '.join(get_args(Prediction))}")
    return prediction
