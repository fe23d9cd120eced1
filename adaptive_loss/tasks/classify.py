"""Image classification with four auxiliaries beside the cross-entropy."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptive_loss.data.augment import augmenter, normalise
from adaptive_loss.losses import LossTerms
from adaptive_loss.metrics.calibration import calibration_error
from adaptive_loss.models.simple_cnn import SimpleCNN
from adaptive_loss.probes import evaluating, held_out
from adaptive_loss.seeding import own_generator
from adaptive_loss.tasks import tasks
from adaptive_loss.tasks.base import ImageTask

TEACHER_DECAY = 0.98
TEMPERATURE = 0.1
PROBE_BATCH = 128


def mixed_cross_entropy(logits: Tensor, labels: Tensor, partners: Tensor, share: Tensor) -> Tensor:
    """λ·CE(z, y) + (1−λ)·CE(z, y′) for images mixed as λx + (1−λ)x′ (Zhang et al. 2018, "mixup").

    Args:
        logits: [B, C] of the mixed images.
        labels, partners: [B] classes y and y′.
        share: λ in [0, 1], 0-dim.
    """
    return share * F.cross_entropy(logits, labels) + (1 - share) * F.cross_entropy(logits, partners)


def supervised_contrastive(features: Tensor, labels: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """−mean over i of mean over its positives p of log softmax_{a≠i}(zᵢ·z_a/τ)_p (Khosla et al. 2020, eq. 2).

    Args:
        features: [B, D], normalised to unit length here.
        labels: [B]; images of one class are each other's positives; an image without one counts 0.
        temperature: τ > 0.
    """
    unit = F.normalize(features.float(), dim=1)
    self_pairs = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    log_share = F.log_softmax((unit @ unit.T / temperature).masked_fill(self_pairs, -1e9), dim=1)
    positives = (labels[:, None] == labels) & ~self_pairs
    return -((log_share * positives).sum(1) / positives.sum(1).clamp_min(1)).mean()


def confidence_penalty(log_probabilities: Tensor) -> Tensor:
    """KL(p ‖ uniform) = log C − H(p), mean over the batch (Pereyra et al. 2017, up to a constant). [B, C] → 0-dim."""
    entropy = -(log_probabilities.exp() * log_probabilities).sum(1).mean()
    return math.log(log_probabilities.shape[1]) - entropy


@contextmanager
def statistics_left_alone(model: nn.Module) -> Iterator[None]:
    """Passes in here normalise by their own batch and leave the running statistics as they are.

    Those are for evaluation, on images as they come: mixed ones have less contrast, and would spoil them.
    """
    norms = (module for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    layers = [norm for norm in norms if norm.track_running_stats]
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True


class MeanTeacher:
    """A running mean of the model's weights, whose predictions are targets (Tarvainen & Valpola 2017).

    θ′ ← dθ′ + (1−d)θ after every step, with d = min(0.98, (n+1)/(n+10)) so that the start is soon forgotten; running
    batch statistics are averaged too.

    Args:
        model: the student.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.updates = 0

    def loss(self, images: Tensor, log_probabilities: Tensor) -> Tensor:
        """KL(teacher ‖ student), mean over the batch."""
        with torch.no_grad():
            target = F.softmax(self.model(images).float(), dim=1)
        return F.kl_div(log_probabilities, target, reduction="batchmean")

    @torch.no_grad()
    def update(self, student: nn.Module) -> None:
        """Take in the student's weights."""
        decay = min(TEACHER_DECAY, (self.updates + 1) / (self.updates + 10))
        self.updates += 1
        for mine, theirs in zip(self.model.state_dict().values(), student.state_dict().values(), strict=True):
            if mine.is_floating_point():
                mine.lerp_(theirs, 1 - decay)
            else:
                mine.copy_(theirs)


@tasks.register("classify")
class Classify(ImageTask):
    """Terms of a classifier; ``mixup`` and the teacher need a pass of their own.

    - ``cross_entropy`` (base): on the augmented batch.
    - ``mixup``: mixed-sample cross-entropy on a quarter of the batch, λ ~ U(0, 1).
    - ``self_distillation``: KL to the predictions of a running mean of the model's own weights.
    - ``contrastive``: supervised-contrastive loss of the hidden features, τ = 0.1.
    - ``confidence``: KL(p ‖ uniform).

    The objective is the cross-entropy on the probe split; ``evaluate`` gives accuracy, cross-entropy and
    calibration error.
    """

    terms = ("cross_entropy", "mixup", "self_distillation", "contrastive", "confidence")
    base = "cross_entropy"
    metric = "accuracy"
    objectives = ("cross_entropy",)
    models = ("simple_cnn",)

    def __init__(self, config: Any, data: Any, device: torch.device, **options: Any) -> None:
        super().__init__(config, data, device, **options)
        channels, size, _ = data.image_shape
        self.network = SimpleCNN(size, channels, len(data.classes)).to(device)
        self.model = self.network.to(memory_format=torch.channels_last) if channels == 3 else self.network  # pyright: ignore
        # The last layer that every term's gradient passes, mixup's own pass included: no gradient goes further back.
        self.tap = next(iter(self.network.hidden.parameters()))
        self.augment = augmenter(config.augment, config.dataset)
        self.augmenting = own_generator(config.seed, "augment")
        self.mixing = own_generator(config.seed, "mixup")
        self.teacher = MeanTeacher(self.network)
        probe = self.splits["probe"]
        self.probe = held_out(
            self._objective,
            (probe.images, probe.labels),
            batch_size=PROBE_BATCH,
            model=self.model,
            seed=own_generator(config.seed, "probe").initial_seed(),
        )

    def losses(self, rows: Tensor) -> LossTerms:
        """The wanted terms on one batch."""
        train = self.splits["train"]
        rows = rows.to(self.device)
        images = normalise(self.augment(train.images[rows], self.augmenting), self.mean, self.std)
        labels = train.labels[rows]
        features = self.network.features(images)
        log_probabilities = F.log_softmax(self.network.classify(features).float(), dim=1)
        terms = {"cross_entropy": F.nll_loss(log_probabilities, labels)}
        if "mixup" in self.wanted:
            terms["mixup"] = self._mixup(images, labels)
        if "self_distillation" in self.wanted:
            terms["self_distillation"] = self.teacher.loss(images, log_probabilities)
        if "contrastive" in self.wanted:
            terms["contrastive"] = supervised_contrastive(features, labels)
        if "confidence" in self.wanted:
            terms["confidence"] = confidence_penalty(log_probabilities)
        return {name: loss for name, loss in terms.items() if name in self.wanted}

    def after_step(self) -> None:
        """Let the teacher follow."""
        if "self_distillation" in self.wanted:
            self.teacher.update(self.network)

    def _mixup(self, images: Tensor, labels: Tensor) -> Tensor:
        part = max(1, len(images) // 4)
        share = torch.rand((), generator=self.mixing).to(self.device)
        partners = torch.randperm(len(images), generator=self.mixing)[:part].to(self.device)
        with statistics_left_alone(self.model):
            logits = self.model(share * images[:part] + (1 - share) * images[partners])
        return mixed_cross_entropy(logits.float(), labels[:part], labels[partners], share)

    def _objective(self, images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.model(normalise(images, self.mean, self.std)).float(), labels)

    @torch.no_grad()
    def evaluate(self, split: str) -> Mapping[str, float]:
        """``accuracy`` as a fraction, ``loss``, the mean cross-entropy in nats, and ``calibration_error``."""
        with evaluating(self.model):
            found = [
                (self.model(normalise(images, self.mean, self.std)).double(), labels)
                for images, labels in self.evaluation_batches(split)
            ]
        logits, labels = (torch.cat(part) for part in zip(*found, strict=True))
        return {
            "accuracy": float((logits.argmax(1) == labels).double().mean()),
            "loss": float(F.cross_entropy(logits, labels)),
            "calibration_error": calibration_error(logits.softmax(1), labels),
        }

    def state_dict(self) -> dict[str, Any]:
        """Generators and the teacher."""
        return {
            "augmenting": self.augmenting.get_state(),
            "mixing": self.mixing.get_state(),
            "teacher": self.teacher.model.state_dict(),
            "teacher_updates": self.teacher.updates,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self.augmenting.set_state(state["augmenting"])
        self.mixing.set_state(state["mixing"])
        self.teacher.model.load_state_dict(state["teacher"])
        self.teacher.updates = state["teacher_updates"]
