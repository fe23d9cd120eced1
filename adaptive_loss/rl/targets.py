"""The maths of the Deep Q-network: targets, the conservative penalty, the ensemble's lower bound."""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adaptive_loss.rl.replay import Batch


def td_target(batch: Batch, target_values: Tensor, choosing_values: Tensor) -> Tensor:
    """y = R + γ^m · Q_target(s', argmax_{a allowed at s'} Q_choosing(s', a)), and y = R where s' is terminal.

    Args:
        batch: transitions, of any leading shape.
        target_values: [..., A] values of s' by the target network.
        choosing_values: [..., A] values of s' that pick the action: the online network's for double Q-learning,
            `target_values` itself for the plain form.

    Returns:
        [...].

    Reference:
        van Hasselt, Guez and Silver, *Deep reinforcement learning with double Q-learning*, 2016, equation 4
        (https://arxiv.org/abs/1509.06461).
    """
    best = choosing_values.masked_fill(~batch.next_mask, -math.inf).argmax(dim=-1, keepdim=True)
    following = target_values.gather(-1, best).squeeze(-1)
    return torch.where(batch.terminal, batch.ret, batch.ret + batch.discount * following)


def conservative_penalty(values: Tensor, action: Tensor) -> Tensor:
    """Mean over the batch of logsumexp_b Q(s, b) − Q(s, a): large where actions not in the data look good.

    Args:
        values: [..., A].
        action: [...] the actions in the data.

    Returns:
        0-dim, at least 0.

    Example:
        >>> import torch
        >>> from adaptive_loss.rl.targets import conservative_penalty
        >>> conservative_penalty(torch.tensor([[0.0, 0.0]]), torch.tensor([1]))  # log 2
        tensor(0.6931)

    Reference:
        Kumar et al., *Conservative Q-learning for offline reinforcement learning*, 2020, equation 4
        (https://arxiv.org/abs/2006.04779).
    """
    return (values.logsumexp(dim=-1) - values.gather(-1, action.unsqueeze(-1)).squeeze(-1)).mean()


def lower_bounds(values: Tensor | NDArray[np.float32], default_action: int, k: float) -> NDArray[np.float32]:
    """LB(a) = mean_e A_e(a) − k · std_e A_e(a), with A_e(a) = Q_e(a) − Q_e(d) the gain of member e over the default d.

    In NumPy, whose calls cost less on arrays so small.

    Args:
        values: [E, A] Q_e(a).
        default_action: d.
        k: how many sample standard deviations a gain must exceed; a lone member has deviation 0.

    Returns:
        [A], exactly 0 at d.

    Example:
        >>> import numpy as np
        >>> from adaptive_loss.rl.targets import lower_bounds
        >>> lower_bounds(np.array([[0.0, 1.0], [0.0, 3.0]]), default_action=0, k=1.0).round(4).tolist()
        [0.0, 0.5858]
    """
    given = np.asarray(values)
    gains = given - given[:, default_action, None]
    mean = np.add.reduce(gains) / len(gains)
    apart = gains - mean
    return mean - k * np.sqrt(np.add.reduce(apart * apart) / max(1, len(gains) - 1))
