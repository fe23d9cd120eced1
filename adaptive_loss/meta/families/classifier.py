"""Digits with mixup (helpful), confidence penalty, label noise (harmful) and feature size (irrelevant)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from adaptive_loss.meta.families import families
from adaptive_loss.meta.families._digits import split_digits
from adaptive_loss.meta.families.base import Family, Run, Tensors, perceptron
from adaptive_loss.tasks.classify import confidence_penalty, mixed_cross_entropy


class Classifier(Run):
    """A perceptron with one hidden layer of features."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.body = nn.Sequential(perceptron(64, hidden), nn.ReLU())
        self.head = nn.Linear(hidden, 10)

    def losses(self, data: Tensors, draw: Tensors) -> Tensor:
        """[5]."""
        x, y = data["x"][draw["rows"]], data["y"][draw["rows"]]
        features = self.body(x)
        log_p = F.log_softmax(self.head(features), 1)
        share, partners = draw["share"], draw["partners"]
        mixed = self.head(self.body(share * x + (1 - share) * x[partners]))
        return torch.stack(
            [
                F.nll_loss(log_p, y),
                mixed_cross_entropy(mixed, y, y[partners], share),
                confidence_penalty(log_p),
                F.nll_loss(log_p, data["noisy"][draw["rows"]]),
                features.square().mean(),
            ]
        )

    def objective(self, data: Tensors, draw: Tensors) -> Tensor:
        """Cross-entropy."""
        return F.cross_entropy(self.head(self.body(data["probe_x"][draw["rows"]])), data["probe_y"][draw["rows"]])

    def judged(self, data: Tensors) -> Tensor:
        """Cross-entropy."""
        return F.cross_entropy(self.head(self.body(data["judge_x"])), data["judge_y"])


@families.register("classifier")
class ClassifierFamily(Family):
    """Digits, few of them."""

    name = "classifier"
    terms = ("cross_entropy", "mixup", "confidence", "label_noise", "feature_size")
    may_use_momentum = True
    base = "cross_entropy"
    customary = (1.0, 1.0, 1.0, 1.0, 1.0)

    def run(self) -> Run:
        """A classifier."""
        return Classifier(self.hidden)

    def data(self, dice: Generator) -> dict[str, Tensor]:
        """A split of the digits of its own, and labels at random."""
        data = split_digits(self.n_train, dice)
        return {**data, "noisy": torch.randint(10, data["y"].shape, generator=dice)}

    def draws(self, steps: int, dice: Generator) -> dict[str, Tensor]:
        """Rows, and mixup's partners and shares."""
        drawn = super().draws(steps, dice)
        partners = torch.rand(drawn["rows"].shape, generator=dice).argsort(1)
        return {**drawn, "partners": partners, "share": torch.rand(steps, generator=dice)}
