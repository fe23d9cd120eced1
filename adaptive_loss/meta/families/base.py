"""What a family of small training runs is: many runs of it are stacked, and step as one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor, nn

BATCH = 32
WRONG = 1.0
"""Start weights are wrong by up to 10 to this power, either way."""

Tensors = Mapping[str, Tensor]


class Run(nn.Module, ABC):
    """The model of one run with its losses.

    Runs are stacked (``torch.func.stack_module_state``) and called under ``torch.func.vmap``, so nothing in here draws
    at random, keeps state or branches on values: whatever is drawn comes in ``draw``. Parameters whose names start
    with ``rival.`` belong to an opponent, which is trained by :meth:`rival_loss` alone.
    """

    def forward(self, what: str, *inputs: Tensors) -> Any:
        """Call the method ``what``: a stacked module can only be called as a function of its state."""
        return getattr(self, what)(*inputs)

    @abstractmethod
    def losses(self, data: Tensors, draw: Tensors) -> Tensor:
        """[K] the terms of one training step."""

    @abstractmethod
    def objective(self, data: Tensors, draw: Tensors) -> Tensor:
        """What the weights are chosen by, on the probe's part of the data."""

    @abstractmethod
    def judged(self, data: Tensors) -> Tensor:
        """The final number, positive, lower is better, on a part of the data that nothing else reads."""

    def rival_loss(self, data: Tensors, draw: Tensors) -> Tensor:
        """The opponent's loss, where there is one."""
        raise NotImplementedError


class Family(ABC):
    """Runs of one kind; an instance is one draw of what the runs of a fleet share: architecture, sizes, optimizer.

    Args:
        dice: draws it.
    """

    name: ClassVar[str]
    terms: ClassVar[tuple[str, ...]]
    base: ClassVar[str | None] = None
    customary: ClassVar[tuple[float, ...]]
    """[K] weights around which the start weights are wrong."""
    pinned: ClassVar[tuple[str, ...]] = ()
    """Terms that controller and monitor leave alone."""
    has_rival: ClassVar[bool] = False
    may_use_momentum: ClassVar[bool] = False
    """Whether plain momentum trains it as well as Adam does, which is drawn then."""
    n_probe: ClassVar[int] = 150
    """Examples of the probe's part."""
    is_held_apart: ClassVar[bool] = False
    """Whether nothing is ever trained on it."""

    def __init__(self, dice: Generator) -> None:
        self.n_train = whole(150, 900, dice)
        self.hidden = 8 * whole(2, 6, dice)
        self.optimizer = "momentum" if self.may_use_momentum and chance(dice) < 0.3 else "adam"

    @abstractmethod
    def run(self) -> Run:
        """A fresh model, initialised from the global generator."""

    @abstractmethod
    def data(self, dice: Generator) -> dict[str, Tensor]:
        """One run's data, all of its parts."""

    def draws(self, steps: int, dice: Generator) -> dict[str, Tensor]:
        """[steps, …] what each training step draws; ``rows`` are the examples of its batch."""
        return {"rows": torch.randint(self.n_train, (steps, BATCH), generator=dice)}

    def looks(self, count: int, dice: Generator) -> dict[str, Tensor]:
        """[count, …] what each value of the objective draws; ``rows`` are of the probe's part."""
        return {"rows": torch.randint(self.n_probe, (count, BATCH), generator=dice)}

    def learning_rate(self, dice: Generator) -> float:
        """Of one run."""
        fast = 10 ** between(-3.0, -2.0, dice)
        return fast if self.optimizer == "adam" else 3 * fast

    def start(self, dice: Generator) -> dict[str, float]:
        """Start weights of one run: the base's as it is usual, each other wrong by its own factor."""
        wrong = [1.0 if name == self.base else 10 ** between(-WRONG, WRONG, dice) for name in self.terms]
        return {name: usual * w for name, usual, w in zip(self.terms, self.customary, wrong, strict=True)}


def perceptron(*sizes: int, activation: type[nn.Module] = nn.SiLU) -> nn.Sequential:
    """Linear layers of these sizes, with an activation between each two."""
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes):
        layers += [nn.Linear(before, after), activation()]
    return nn.Sequential(*layers[:-1])


def chance(dice: Generator) -> float:
    """A number in [0, 1)."""
    return float(torch.rand((), generator=dice))


def between(low: float, high: float, dice: Generator) -> float:
    """A number in [low, high)."""
    return low + (high - low) * chance(dice)


def whole(low: int, high: int, dice: Generator) -> int:
    """A whole number in [low, high]."""
    return int(torch.randint(low, high + 1, (), generator=dice))
