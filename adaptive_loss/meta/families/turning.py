"""Few digits with labels, and two hints: one that turns harmful at a random step, one that turns helpful."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from adaptive_loss.meta.families import families
from adaptive_loss.meta.families._digits import split_digits
from adaptive_loss.meta.families.base import BATCH, Family, Run, Tensors, perceptron, whole

OWN = 60


class Hinted(Run):
    """A perceptron."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.network = perceptron(64, hidden, 10)

    def losses(self, data: Tensors, draw: Tensors) -> Tensor:
        """[3]."""
        own = F.cross_entropy(self.network(data["x"][draw["own"]]), data["y"][draw["own"]])
        x, y, wrong = (data[name][draw["rows"]] for name in ("x", "y", "wrong"))
        log_p = F.log_softmax(self.network(x), 1)
        right, false = F.nll_loss(log_p, y), F.nll_loss(log_p, wrong)
        return torch.stack([own, *(torch.where(draw[name] > 0, false, right) for name in ("souring", "sweetening"))])

    def objective(self, data: Tensors, draw: Tensors) -> Tensor:
        """Cross-entropy."""
        return F.cross_entropy(self.network(data["probe_x"][draw["rows"]]), data["probe_y"][draw["rows"]])

    def judged(self, data: Tensors) -> Tensor:
        """Cross-entropy."""
        return F.cross_entropy(self.network(data["judge_x"]), data["judge_y"])


@families.register("turning")
class TurningFamily(Family):
    """For the proof that watching pays: what is right at first is wrong later. Nothing is ever trained on it."""

    name = "turning"
    terms = ("cross_entropy", "souring", "sweetening")
    may_use_momentum = True
    base = "cross_entropy"
    customary = (1.0, 1.0, 1.0)
    is_held_apart = True

    def run(self) -> Run:
        """A classifier."""
        return Hinted(self.hidden)

    def data(self, dice: Generator) -> dict[str, Tensor]:
        """A split of the digits of its own, and for each a wrong label."""
        data = split_digits(self.n_train, dice)
        off = torch.randint(1, 10, data["y"].shape, generator=dice)
        return {**data, "wrong": (data["y"] + off) % 10}

    def draws(self, steps: int, dice: Generator) -> dict[str, Tensor]:
        """Rows, and for each hint whether it misleads."""
        time = torch.arange(steps)
        sours, sweetens = (whole(steps // 5, steps // 2, dice) for _ in range(2))
        own = torch.randint(OWN, (steps, BATCH // 2), generator=dice)
        turned = {"souring": (time >= sours).float(), "sweetening": (time < sweetens).float()}
        return {**super().draws(steps, dice), "own": own, **turned}
