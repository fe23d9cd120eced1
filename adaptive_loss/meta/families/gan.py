"""Points on a ring from noise: adversarial, moments (helpful), spread (either) and shrinking (harmful)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from adaptive_loss.meta.families import families
from adaptive_loss.meta.families.base import BATCH, Family, Run, Tensors, between, perceptron, whole

NOISE = 4
R1 = 0.1
JUDGED = 300
_WIDTHS = (0.3, 1.0, 3.0)


class Adversaries(Run):
    """Generator and critic."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.generator = perceptron(NOISE, hidden, hidden, 2)
        self.rival = perceptron(2, hidden, hidden, 1)

    def losses(self, data: Tensors, draw: Tensors) -> Tensor:
        """[4]."""
        noise, other, real = draw["noise"], draw["other"], data["x"][draw["rows"]]
        made, again = self.generator(noise), self.generator(other)
        apart = (made - again).abs().mean(1) / (noise - other).abs().mean(1).clamp_min(0.1)
        moments = (made.mean(0) - real.mean(0)).square().sum() + (second(made) - second(real)).square().sum()
        return torch.stack(
            [F.softplus(-self.rival(made)).mean(), moments, torch.exp(-apart).mean(), made.square().mean()]
        )

    def rival_loss(self, data: Tensors, draw: Tensors) -> Tensor:
        """The critic's logistic loss with R1."""
        real, made = data["x"][draw["rows"]], self.generator(draw["noise"]).detach()
        slope = torch.func.grad(lambda x: self.rival(x).sum())(real)
        logistic = F.softplus(-self.rival(real)).mean() + F.softplus(self.rival(made)).mean()
        return logistic + R1 / 2 * slope.square().sum(1).mean()

    def objective(self, data: Tensors, draw: Tensors) -> Tensor:
        """Kernel distance to data held out."""
        return kernel_distance(self.generator(draw["noise"]), data["probe_x"][draw["rows"]])

    def judged(self, data: Tensors) -> Tensor:
        """Kernel distance to data that nothing else reads."""
        return kernel_distance(self.generator(data["noise"]), data["judge_x"])


def second(points: Tensor) -> Tensor:
    """[2, 2] second moments."""
    return points.T @ points / len(points)


def kernel_distance(a: Tensor, b: Tensor) -> Tensor:
    """Squared MMD under a sum of Gaussian kernels, the biased estimate, which is never negative."""
    points = torch.cat([a, b])
    sign = torch.cat([torch.full((len(a),), 1 / len(a)), torch.full((len(b),), -1 / len(b))])
    squares = (points[:, None] - points).square().sum(-1)
    kernel = sum((torch.exp(-squares / (2 * width**2)) for width in _WIDTHS), torch.zeros(()))
    return (sign @ kernel @ sign).clamp_min(1e-8)


@families.register("gan")
class AdversarialFamily(Family):
    """Rings of four to ten Gaussians."""

    name = "gan"
    terms = ("adversarial", "moments", "spread", "shrink")
    base = "adversarial"
    customary = (1.0, 1.0, 0.3, 0.03)
    has_rival = True

    def __init__(self, dice: Generator) -> None:
        super().__init__(dice)
        self.modes = whole(4, 10, dice)

    def run(self) -> Run:
        """Generator and critic."""
        return Adversaries(self.hidden)

    def data(self, dice: Generator) -> dict[str, Tensor]:
        """Points of a ring that is drawn once a run."""
        radius, width = between(1.0, 2.0, dice), between(0.05, 0.2, dice)
        parts = {"x": self.n_train, "probe_x": 150, "judge_x": JUDGED}
        points = {name: self._points(count, radius, width, dice) for name, count in parts.items()}
        return {**points, "noise": torch.randn(JUDGED, NOISE, generator=dice)}

    def _points(self, count: int, radius: float, width: float, dice: Generator) -> Tensor:
        angle = torch.randint(self.modes, (count,), generator=dice) * (2 * math.pi / self.modes)
        centres = radius * torch.stack([angle.cos(), angle.sin()], dim=1)
        return centres + width * torch.randn(count, 2, generator=dice)

    def draws(self, steps: int, dice: Generator) -> dict[str, Tensor]:
        """Rows, and the noise of two batches."""
        noise = {name: torch.randn(steps, BATCH, NOISE, generator=dice) for name in ("noise", "other")}
        return {**super().draws(steps, dice), **noise}

    def looks(self, count: int, dice: Generator) -> dict[str, Tensor]:
        """Rows and noise."""
        return {**super().looks(count, dice), "noise": torch.randn(count, BATCH, NOISE, generator=dice)}

    def learning_rate(self, dice: Generator) -> float:
        """A third of the others', for both."""
        return super().learning_rate(dice) / 3
