"""A noisy target with few examples, a related task (helpful), an unrelated one and its own negative (harmful)."""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn

from adaptive_loss.meta.families import families
from adaptive_loss.meta.families.base import Family, Run, Tensors, between, perceptron, whole

WIDTH, SHARED, JUDGED = 12, 6, 300
_COLUMNS = (0, 1, 2, 0)


class Heads(Run):
    """One hidden layer, a column of outputs a task."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.network = perceptron(WIDTH, hidden, 3, activation=nn.Tanh)

    def losses(self, data: Tensors, draw: Tensors) -> Tensor:
        """[4]."""
        outputs, goals = self.network(data["x"][draw["rows"]]), data["goals"][draw["rows"]]
        return (outputs[:, _COLUMNS] - goals).square().mean(0)

    def objective(self, data: Tensors, draw: Tensors) -> Tensor:
        """Squared error on the noisy target, held out."""
        outputs = self.network(data["probe_x"][draw["rows"]])
        return (outputs[:, 0] - data["probe_y"][draw["rows"]]).square().mean()

    def judged(self, data: Tensors) -> Tensor:
        """Squared error on the target without its noise."""
        return (self.network(data["judge_x"])[:, 0] - data["judge_y"]).square().mean()


@families.register("multitask")
class RegressionFamily(Family):
    """Random functions of twelve inputs."""

    name = "multitask"
    terms = ("fit", "related", "unrelated", "opposed")
    base = "fit"
    customary = (1.0, 1.0, 1.0, 0.3)
    n_probe = 100

    def __init__(self, dice: Generator) -> None:
        super().__init__(dice)
        self.n_train = whole(60, 400, dice)

    def run(self) -> Run:
        """A network."""
        return Heads(self.hidden)

    def data(self, dice: Generator) -> dict[str, Tensor]:
        """A function that is drawn once a run, and noisy examples of it."""
        inputs = torch.randn(self.n_train + 100 + JUDGED, WIDTH, generator=dice)
        shared = torch.tanh(inputs @ torch.randn(WIDTH, SHARED, generator=dice) / 2)
        mix = torch.randn(SHARED, 2, generator=dice)
        main, related = shared @ mix[:, 0], shared @ (mix[:, 0] + 0.3 * mix[:, 1])
        unrelated = inputs @ torch.randn(WIDTH, generator=dice) / 3
        noisy = main + between(0.1, 1.0, dice) * torch.randn(main.shape, generator=dice)
        n, m = self.n_train, self.n_train + 100
        goals = torch.stack([noisy, related, unrelated, -noisy], dim=1)
        held = {"probe_x": inputs[n:m], "probe_y": noisy[n:m], "judge_x": inputs[m:], "judge_y": main[m:]}
        return {"x": inputs[:n], "goals": goals[:n], **held}

    def learning_rate(self, dice: Generator) -> float:
        """Twice the others'."""
        return 2 * super().learning_rate(dice)
