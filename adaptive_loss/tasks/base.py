"""What a task is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

from adaptive_loss.data.base import Dataset, Split
from adaptive_loss.data.points import PointDataset, Points
from adaptive_loss.errors import UsageError
from adaptive_loss.events import Event
from adaptive_loss.losses import LossTerms
from adaptive_loss.probes import held_out, sample_quality
from adaptive_loss.utils.config import RunConfig
from adaptive_loss.weighting import weightings
from adaptive_loss.weighting.base import Weighting

EVALUATION_BATCH = 500
PEAK = 3.0
"""The one-cycle schedule rises from ``--lr`` to this many times it, then falls to almost 0."""


@dataclass(frozen=True)
class Opponent:
    """A network that is trained beside the task's own, by an optimizer and an executor of its own: a discriminator.

    Args:
        name: of the network.
        terms: what it is trained on, the base first; their names are no other's in the task.
    """

    name: str
    terms: tuple[str, ...]


class Task(ABC):
    """One kind of training: named terms over a model and a dataset, an objective and metrics.

    Args:
        config: the run.
        data: the splits.
        device: where everything lives.
        wanted: the terms to compute; the others are left out, with their cost.
        train: the split to train on; None takes ``data.train``.

    Raises:
        UsageError: the run asks for a dataset, an objective or a model that the task does not have.
    """

    terms: ClassVar[tuple[str, ...]]
    """Names of the terms in order, the base first."""
    base: ClassVar[str | None]
    """The term whose weight stays put."""
    opponents: ClassVar[tuple[Opponent, ...]] = ()
    """The networks that are trained beside ``model``, in the order in which they step, each before ``model`` does."""
    datasets: ClassVar[tuple[str, ...]] = ("digits", "fashion_mnist", "cifar10")
    """What it can be trained on (``--dataset``), the default first."""
    customary: ClassVar[Mapping[str, float]] = {}
    """The fixed weights that are published or usual, which ``--mode customary`` takes; 1 where not named."""
    targets: ClassVar[Mapping[str, float]] = {}
    """Values, in the terms' own units, at which a mode that adapts holds the terms that are constraints: a law holds
    them there, and no look-ahead moves them. ``--targets`` says otherwise."""
    pinned: ClassVar[tuple[str, ...]] = ()
    """Auxiliaries that hold an estimator together: no look-ahead moves them, and no study starts from them wrong."""
    bucket_rule: ClassVar[str | None] = None
    """Where the terms are one loss in buckets, of noise levels say: what mode ``adaptive`` weighs them by, unless
    ``--weighting`` names another rule, and with no look-ahead above it. They compete for one network, and a look-ahead
    of one step takes the part that learns fastest for the one that is worth most."""
    rule_options: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """What the task knows that a rule of ``--weighting`` is made with: need (of ``Weighting.needs``) → arguments."""
    metric: ClassVar[str] = "loss"
    """What of ``evaluate()`` weights are chosen by; lower is better, but for ``accuracy``."""
    steady: ClassVar[bool] = True
    """Whether a loss that jumps is a fault. In a game it jumps because the other side has moved, and where weights make
    Adam's steps wide it comes back by itself: to refuse such steps would end the run."""
    objectives: ClassVar[tuple[str, ...]] = ()
    """What the probe may measure (``--objective``), the default first."""
    models: ClassVar[tuple[str, ...]] = ()
    """What may be trained (``--model``)."""
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "bf16")
    """Arithmetic that its terms bear (``--precision``); auto takes bf16 only where it is among them."""
    quick: ClassVar[Mapping[str, Any]] = {"epochs": 5}
    """Settings of ``--quick``: a minute at most on one core."""
    smoke: ClassVar[Mapping[str, Any]] = {"epochs": 1, "subset": 500}
    """Settings of ``--smoke``: ten seconds at most, to see that it runs."""
    model: nn.Module
    """What the terms train."""
    probe: held_out | sample_quality
    """The objective on the probe split."""
    source: Mapping[str, object]
    """Where the data come from, with their hash."""
    holds_out: bool
    """Whether the select split is kept from training, so that it may be measured on."""
    tap: Tensor | Sequence[Tensor] | None = None
    """Where a rule takes the terms' gradients: parameters, or tensors of the last ``losses()`` that all terms share."""

    def __init__(
        self,
        config: RunConfig,
        data: Dataset | PointDataset,
        device: torch.device,
        *,
        wanted: Collection[str] | None = None,
        train: Split | Points | None = None,
    ) -> None:
        check_dataset(config.dataset, self.datasets)
        check_choice("objective", config.objective, self.objectives)
        check_choice("model", config.model, self.models)
        check_choice("precision", config.precision, ("auto", *self.precisions))
        self.config, self.device = config, device
        self.source, self.holds_out = data.provenance, train is None
        self.wanted = frozenset(self.all_terms() if wanted is None else wanted)

    @classmethod
    def all_terms(cls) -> tuple[str, ...]:
        """The task's terms, then its opponents'."""
        return cls.terms + tuple(term for opponent in cls.opponents for term in opponent.terms)

    @classmethod
    def bases(cls) -> tuple[str, ...]:
        """The terms that cannot be switched off: the base, then each opponent's."""
        own = () if cls.base is None else (cls.base,)
        return own + tuple(opponent.terms[0] for opponent in cls.opponents)

    @abstractmethod
    def losses(self, rows: Tensor) -> LossTerms:
        """The wanted terms on the training examples ``rows`` (indices); a term may be absent this step."""

    @abstractmethod
    def evaluate(self, split: str) -> Mapping[str, float]:
        """Metrics on a whole split; ``loss`` (lower is better) always among them, ``accuracy`` where there is one."""

    def opponent(self, name: str) -> nn.Module:
        """The network of one of ``opponents``."""
        raise NotImplementedError

    def opponent_losses(self, name: str, rows: Tensor) -> LossTerms:
        """An opponent's wanted terms on the training examples ``rows``, the same as ``losses()`` gets after it."""
        raise NotImplementedError

    def weighting(self, name: str) -> Weighting:
        """The rule of that name, made with what the task knows of the rule's needs."""
        rule = weightings.get(name)
        known = {**self.rule_options, "a schedule": {"schedule": self.config.schedule}}
        options = {key: value for need in rule.needs for key, value in known.get(need, {}).items()}
        return rule(len(self.terms), **options)

    def optimizer(self, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        """What steps ``model`` or an opponent."""
        return torch.optim.Adam(parameters, lr=self.config.lr)

    def scheduler(self, optimizer: torch.optim.Optimizer, steps: int) -> LRScheduler:
        """The learning rate over a run of ``steps``."""
        return OneCycleLR(optimizer, PEAK * self.config.lr, total_steps=max(steps, 2), div_factor=PEAK)

    def after_step(self) -> Sequence[Event] | None:
        """Called after every optimizer step of ``model``, applied or skipped.

        Returns:
            What it has to report, if anything.
        """

    @property
    def collapsed(self) -> Mapping[str, str]:
        """The opponents that teach nothing any more, each with the reason in one line."""
        return {}

    def pictures(self) -> Mapping[str, Tensor]:
        """What a person looks at, by name: images ``[N, C, H, W]`` in 0 to 1, of the same inputs at every call."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What besides the networks must survive a restart."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""


class ImageTask(Task):
    """A task on images.

    Attributes:
        splits: train, probe, select and test, on the device.
        mean, std: [C] of the training images, in units of full scale.
    """

    def __init__(self, config: RunConfig, data: Dataset, device: torch.device, **options: Any) -> None:
        super().__init__(config, data, device, **options)
        held = options.get("train")
        train = data.train if held is None else held
        chosen = {"train": train, "probe": data.probe, "select": data.select, "test": data.test}
        self.splits = {name: Split(split.images.to(device), split.labels.to(device)) for name, split in chosen.items()}
        self.mean, self.std = data.mean.to(device), data.std.to(device)

    def evaluation_batches(self, split: str) -> Iterator[tuple[Tensor, Tensor]]:
        """The images and labels of a whole split, in pieces."""
        data = self.splits[split]
        for start in range(0, len(data), EVALUATION_BATCH):
            yield data.images[start : start + EVALUATION_BATCH], data.labels[start : start + EVALUATION_BATCH]


class PointTask(Task):
    """A task on points: a function, a distribution or an equation in a few dimensions.

    Attributes:
        splits: train, probe, select and test, on the device.
    """

    def __init__(self, config: RunConfig, data: PointDataset, device: torch.device, **options: Any) -> None:
        super().__init__(config, data, device, **options)
        held = options.get("train")
        train = data.train if held is None else held
        chosen = {"train": train, "probe": data.probe, "select": data.select, "test": data.test}
        self.splits = {name: Points(part.inputs.to(device), part.targets.to(device)) for name, part in chosen.items()}


def check_dataset(name: str, choices: Sequence[str]) -> None:
    """Raise :class:`UsageError` where a dataset of the package is none of the task's; one from outside may pass."""
    if ":" not in name:
        check_choice("dataset", name, choices)


def check_choice(flag: str, wanted: str | None, choices: Sequence[str]) -> None:
    """Raise :class:`UsageError` where a flag's value is none of the task's ``choices``; None is the task's own."""
    if wanted is not None and wanted not in choices:
        raise UsageError(f"--{flag} {wanted} is not one of this task's; choose from: {', '.join(choices) or 'none'}")
