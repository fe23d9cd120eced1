"""A small classifier that learns from labels and from a larger one, and stays near where it began."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from adaptive_loss.data.augment import Augment, augmenter
from adaptive_loss.data.base import Split
from adaptive_loss.losses import LossTerms
from adaptive_loss.models.feature_cnn import FeatureCNN
from adaptive_loss.probes import held_out
from adaptive_loss.seeding import own_generator
from adaptive_loss.tasks import tasks
from adaptive_loss.tasks.base import ImageTask

TEMPERATURE = 4.0
PROBE_BATCH = 128
FITTING_BATCH = 50
FITTING_RATE = 5e-3


@dataclass(frozen=True)
class Size:
    """A network's size and the steps of plain cross-entropy that it takes before the run."""

    widths: Sequence[int]
    features: int
    steps: int


TEACHER = Size((32, 64), features=128, steps=400)
STUDENT = Size((8, 16), features=32, steps=60)


def soft_target_divergence(student: Tensor, teacher: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """T²·KL(softmax(t/T) ‖ softmax(s/T)) in nats, mean over the batch (Hinton, Vinyals & Dean 2015, section 2).

    T² keeps the gradient's size as T changes, since soft targets' gradients scale as 1/T².

    Args:
        student, teacher: logits s and t, [B, C].
        temperature: T > 0.
    """
    soft, target = F.log_softmax(student / temperature, dim=1), F.log_softmax(teacher / temperature, dim=1)
    return temperature**2 * F.kl_div(soft, target, reduction="batchmean", log_target=True)


def divergence(logits: Tensor, reference: Tensor) -> Tensor:
    """KL(p ‖ q) = Σ p (log p − log q) in nats, mean over the batch, for p of ``logits``, q of ``reference``, [B, C]."""
    p, q = F.log_softmax(logits, dim=1), F.log_softmax(reference, dim=1)
    return F.kl_div(q, p, reduction="batchmean", log_target=True)


def fit(network: nn.Module, split: Split, augment: Augment, steps: int, generator: Generator) -> None:
    """Train by cross-entropy alone, with Adam and a falling learning rate; draws from ``generator`` alone."""
    optimizer = torch.optim.Adam(network.parameters(), lr=FITTING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        rows = torch.randint(len(split), (FITTING_BATCH,), generator=generator).to(split.images.device)
        optimizer.zero_grad()
        images = augment(split.images[rows], generator).float() / 255
        F.cross_entropy(network(images), split.labels[rows]).backward()
        optimizer.step()
        schedule.step()
    optimizer.zero_grad()


def frozen(network: FeatureCNN) -> FeatureCNN:
    """``network``, which no longer learns."""
    return network.eval().requires_grad_(False)


@tasks.register("distill")
class Distill(ImageTask):
    """A student under labels, a teacher and a reference.

    - ``cross_entropy`` (base): −log p(label), in nats.
    - ``distillation``: T²·KL(teacher ‖ student) at temperature T = 4, both on the same augmented images (Hinton,
      Vinyals & Dean 2015).
    - ``reference``: KL(student ‖ reference) in nats, the penalty on leaving a reference policy of Ziegler et al. 2019.

    The teacher, of the student's design and many times its size, is trained on the training split before the run, from
    the data's seed: the same for every seed of a study. The student begins with 60 steps of cross-entropy, and the
    reference is that beginning, frozen: a distance to it can be held at a number of nats (``--weighting adaptive_kl
    --targets reference=0.5``), while a running mean follows the student, so that a distance to it is a speed.

    The customary weights are those of RepDistiller's knowledge distillation (Tian, Krishnan & Isola 2020: 0.1 on the
    labels, 0.9 on the teacher, T = 4; Hinton et al. too found a considerably lower weight on the labels best) with the
    base's at 1, and Ziegler et al.'s first β for the reference.

    The objective is the cross-entropy on the probe split. ``evaluate`` gives ``accuracy``, ``loss`` = cross-entropy in
    nats and, with the term in question, ``teacher_accuracy`` and ``agreement``, the share of images for which the
    student says what the teacher says, and ``reference``.
    """

    terms = ("cross_entropy", "distillation", "reference")
    base = "cross_entropy"
    objectives = ("cross_entropy",)
    models = ("feature_cnn",)
    metric = "accuracy"
    customary: ClassVar[Mapping[str, float]] = {"cross_entropy": 1.0, "distillation": 9.0, "reference": 0.2}
    targets: ClassVar[Mapping[str, float]] = {"reference": 1.5}
    quick: ClassVar[Mapping[str, Any]] = {"epochs": 40, "batch_size": 50, "lr": 3e-3}

    def __init__(self, config: Any, data: Any, device: torch.device, **options: Any) -> None:
        super().__init__(config, data, device, **options)
        self.augment = augmenter(config.augment, config.dataset)
        self.augmenting = own_generator(config.seed, "augment")
        self.classes = len(data.classes)
        self.network = self._fitted(STUDENT, own_generator(config.seed, "student"))
        self.model = self.network
        self.reference = frozen(copy.deepcopy(self.network)) if "reference" in self.wanted else None
        self.teacher = None
        if "distillation" in self.wanted:
            self.teacher = frozen(self._fitted(TEACHER, own_generator(config.data_seed, "teacher")))
        probe = self.splits["probe"]
        self.probe = held_out(
            self._objective,
            (probe.images, probe.labels),
            batch_size=PROBE_BATCH,
            model=self.model,
            seed=own_generator(config.seed, "probe").initial_seed(),
        )

    def _fitted(self, size: Size, generator: Generator) -> FeatureCNN:
        """A new network after its steps of cross-entropy; its first weights come from ``generator`` too."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator.initial_seed())
            shape = self.splits["train"].images.shape[1:]
            network = FeatureCNN(shape, self.classes, widths=size.widths, features=size.features).to(self.device)
        network.pixel_mean.copy_(self.mean)
        network.pixel_std.copy_(self.std)
        fit(network, self.splits["train"], self.augment, size.steps, generator)
        return network

    def losses(self, rows: Tensor) -> LossTerms:
        """The wanted terms on one batch."""
        train, rows = self.splits["train"], rows.to(self.device)
        pixels = self.augment(train.images[rows], self.augmenting).float() / 255
        logits = self.network(pixels).float()
        self.tap = logits
        terms = {}
        if "cross_entropy" in self.wanted:
            terms["cross_entropy"] = F.cross_entropy(logits, train.labels[rows])
        if self.teacher is not None:
            terms["distillation"] = soft_target_divergence(logits, self.teacher(pixels).float())
        if self.reference is not None:
            terms["reference"] = divergence(logits, self.reference(pixels).float())
        return terms

    def _objective(self, images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.network(images.float() / 255).float(), labels)

    @torch.no_grad()
    def evaluate(self, split: str) -> Mapping[str, float]:
        """Means over the whole split, of images as they are."""
        self.model.eval()
        sums: dict[str, float] = {}
        for images, labels in self.evaluation_batches(split):
            for name, value in self._measures(images, labels).items():
                sums[name] = sums.get(name, 0.0) + value * len(labels)
        self.model.train()
        return {name: total / len(self.splits[split]) for name, total in sums.items()}

    def _measures(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        pixels = images.float() / 255
        logits = self.network(pixels).double()
        said = logits.argmax(1)
        found = {"accuracy": _share(said == labels), "loss": float(F.cross_entropy(logits, labels))}
        if self.teacher is not None:
            theirs = self.teacher(pixels).argmax(1)
            found |= {"teacher_accuracy": _share(theirs == labels), "agreement": _share(said == theirs)}
        if self.reference is not None:
            found["reference"] = float(divergence(logits, self.reference(pixels).double()))
        return found

    def state_dict(self) -> dict[str, Any]:
        """The augmentation's generator and the frozen networks, which another machine might not train to the bit."""
        state: dict[str, Any] = {"augmenting": self.augmenting.get_state()}
        return state | {name: network.state_dict() for name, network in self._frozen().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self.augmenting.set_state(state["augmenting"])
        for name, network in self._frozen().items():
            network.load_state_dict(state[name])

    def _frozen(self) -> dict[str, FeatureCNN]:
        both = {"teacher": self.teacher, "reference": self.reference}
        return {name: network for name, network in both.items() if network is not None}


def _share(right: Tensor) -> float:
    return float(right.double().mean())
