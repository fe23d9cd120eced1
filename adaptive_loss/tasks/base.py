"""What a task is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from adaptive_loss.data.base import Dataset, Split
from adaptive_loss.errors import UsageError
from adaptive_loss.losses import LossTerms
from adaptive_loss.probes import held_out, sample_quality
from adaptive_loss.utils.config import RunConfig

EVALUATION_BATCH = 500


class Task(ABC):
    """One kind of training: named terms over a model and a dataset, an objective and metrics.

    Args:
        config: the run.
        data: the splits.
        device: where everything lives.
        wanted: the terms to compute; the others are left out, with their cost.
        train: the split to train on; None takes ``data.train``.

    Raises:
        UsageError: the run asks for an objective or a model that the task does not have.
    """

    terms: ClassVar[tuple[str, ...]]
    """Names of the terms in order, the base first."""
    base: ClassVar[str | None]
    """The term whose weight stays put."""
    objectives: ClassVar[tuple[str, ...]] = ()
    """What the probe may measure (``--objective``), the default first."""
    models: ClassVar[tuple[str, ...]] = ()
    """What may be trained (``--model``)."""
    quick: ClassVar[Mapping[str, Any]] = {"epochs": 5}
    """Settings of ``--quick``: a minute at most on one core."""
    smoke: ClassVar[Mapping[str, Any]] = {"epochs": 1, "subset": 500}
    """Settings of ``--smoke``: ten seconds at most, to see that it runs."""
    model: nn.Module
    probe: held_out | sample_quality
    """The objective on the probe split."""
    source: Mapping[str, object]
    """Where the images come from, with their hash."""
    holds_out: bool
    """Whether the select split is kept from training, so that it may be measured on."""
    tap: Tensor | Sequence[Tensor] | None = None
    """Where a rule takes the terms' gradients: parameters, or tensors of the last ``losses()`` that all terms share."""

    def __init__(
        self,
        config: RunConfig,
        data: Dataset,
        device: torch.device,
        *,
        wanted: Collection[str] | None = None,
        train: Split | None = None,
    ) -> None:
        _check_choice("objective", config.objective, self.objectives)
        _check_choice("model", config.model, self.models)
        self.config, self.device = config, device
        self.source, self.holds_out = data.provenance, train is None
        self.wanted = frozenset(self.terms if wanted is None else wanted)
        chosen = {"train": train or data.train, "probe": data.probe, "select": data.select, "test": data.test}
        self.splits = {name: Split(split.images.to(device), split.labels.to(device)) for name, split in chosen.items()}
        self.mean, self.std = data.mean.to(device), data.std.to(device)

    @abstractmethod
    def losses(self, rows: Tensor) -> LossTerms:
        """The wanted terms on the training images ``rows`` (indices); a term may be absent this step."""

    @abstractmethod
    def evaluate(self, split: str) -> Mapping[str, float]:
        """Metrics on a whole split; ``loss`` (lower is better) always among them, ``accuracy`` where there is one."""

    def after_step(self) -> None:
        """Called after every optimizer step, applied or skipped."""

    def state_dict(self) -> dict[str, Any]:
        """What besides the model must survive a restart."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""

    def evaluation_batches(self, split: str) -> Iterator[tuple[Tensor, Tensor]]:
        """The images and labels of a whole split, in pieces."""
        data = self.splits[split]
        for start in range(0, len(data), EVALUATION_BATCH):
            yield data.images[start : start + EVALUATION_BATCH], data.labels[start : start + EVALUATION_BATCH]


def _check_choice(flag: str, wanted: str | None, choices: Sequence[str]) -> None:
    if wanted is not None and wanted not in choices:
        raise UsageError(f"--{flag} {wanted} is not one of this task's; choose from: {', '.join(choices) or 'none'}")
