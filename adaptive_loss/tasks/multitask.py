"""Two overlapping pictures in one: what is on the left, what is on the right, and the whole again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from adaptive_loss.data.base import Split
from adaptive_loss.losses import LossTerms
from adaptive_loss.models.multi_head import MultiHead
from adaptive_loss.probes import held_out
from adaptive_loss.seeding import own_generator
from adaptive_loss.tasks import tasks
from adaptive_loss.tasks.base import EVALUATION_BATCH, ImageTask

PROBE_BATCH = 64
PICTURES = 16
HEADS = ("left", "right")


def shift_of(side: int) -> int:
    """Pixels between the two pictures' corners: a quarter of the side, made a multiple of 4 that halves twice.

    Example:
        >>> [shift_of(side) for side in (8, 28, 32)]
        [4, 8, 8]
    """
    return 4 * -(-side // 16)


def overlay(left: Tensor, right: Tensor, shift: int) -> Tensor:
    """``left`` at the upper left and ``right`` ``shift`` pixels below and to its right, the brighter pixel on top.

    Args:
        left, right: ``[B, C, H, W]``, of one type.
        shift: in pixels.

    Returns:
        ``[B, C, H + shift, W + shift]``, 0 where neither picture is.

    Example:
        >>> overlay(torch.ones(1, 1, 2, 2), 2 * torch.ones(1, 1, 2, 2), 1)[0, 0].tolist()
        [[1.0, 1.0, 0.0], [1.0, 2.0, 2.0], [0.0, 2.0, 2.0]]
    """
    return torch.maximum(F.pad(left, (0, shift, 0, shift)), F.pad(right, (shift, 0, shift, 0)))


def squared_error(reconstruction: Tensor, pixels: Tensor) -> Tensor:
    """Σ over pixels of (x̂ − x)², mean over the batch. [B, C, H, W] → 0-dim."""
    return (reconstruction - pixels).square().flatten(1).sum(1).mean()


@dataclass(frozen=True, eq=False)
class Pairs:
    """Pictures that hold two images each.

    Attributes:
        images: uint8 ``[N, C, H, W]``.
        left, right: int64 ``[N]``, the classes of the two.
    """

    images: Tensor
    left: Tensor
    right: Tensor

    def __len__(self) -> int:
        return len(self.left)

    def part(self, rows: slice) -> Pairs:
        """Some of them."""
        return Pairs(self.images[rows], self.left[rows], self.right[rows])


def paired(split: Split, left: Tensor, right: Tensor) -> Pairs:
    """The images of ``split`` with the indices ``left``, each with the one of ``right`` beside it."""
    images = split.images
    pictures = overlay(images[left], images[right], shift_of(images.shape[-1]))
    return Pairs(pictures, split.labels[left], split.labels[right])


@tasks.register("multitask")
class MultiTask(ImageTask):
    """Three tasks on one trunk, on pairs of images that overlap (after Multi-MNIST: Sabour et al. 2017, section 6).

    - ``left``, ``right``: cross-entropy of either head, −log p(class), in nats.
    - ``reconstruction``: Σ over pixels of (x̂ − x)² of the whole picture in 0 to 1, an image.

    None is the base: they are tasks with equal rights, so the weights keep their sum. Where two images meet the
    brighter pixel shows, as in Sener & Koltun 2018. Every training image is at the left once an epoch, beside one of
    the training split that is drawn anew; the pairs of the other splits are fixed by the data's seed. There is no
    other augmentation. The customary weight of the reconstruction is that of Sabour et al., section 4.1, for the same
    sum of squared errors.

    The objective, and ``loss``, is the mean of both heads' cross-entropy on held-out pairs. ``evaluate`` also gives
    ``accuracy``, the mean of ``left_accuracy`` and ``right_accuracy``, ``left_loss``, ``right_loss`` and
    ``reconstruction``. Rules take gradients at the shared features.
    """

    terms = (*HEADS, "reconstruction")
    base = None
    datasets = ("digits", "fashion_mnist")
    objectives = ("cross_entropy",)
    models = ("multi_head",)
    metric = "accuracy"
    customary: ClassVar[Mapping[str, float]] = {"left": 1.0, "right": 1.0, "reconstruction": 0.0005}
    quick: ClassVar[Mapping[str, Any]] = {"epochs": 30, "lr": 2e-3, "batch_size": 50}

    def __init__(self, config: Any, data: Any, device: torch.device, **options: Any) -> None:
        super().__init__(config, data, device, **options)
        self.pairing = own_generator(config.seed, "pairs")
        self.pairs = {name: self._fixed_pairs(name) for name in ("probe", "select", "test")}
        self.network = MultiHead(self.pairs["probe"].images.shape[1:], len(data.classes)).to(device)
        self.model = self.network
        held = self.pairs["probe"]
        self.probe = held_out(
            self._objective,
            (held.images, held.left, held.right),
            batch_size=PROBE_BATCH,
            model=self.model,
            seed=own_generator(config.seed, "probe").initial_seed(),
        )

    def _fixed_pairs(self, name: str) -> Pairs:
        split = self.splits[name]
        partners = torch.randperm(len(split), generator=own_generator(self.config.data_seed, f"pairs {name}"))
        return paired(split, torch.arange(len(split), device=self.device), partners.to(self.device))

    def losses(self, rows: Tensor) -> LossTerms:
        """The wanted terms on one batch of fresh pairs."""
        train = self.splits["train"]
        partners = torch.randint(len(train), (len(rows),), generator=self.pairing)
        pairs = paired(train, rows.to(self.device), partners.to(self.device))
        pixels = pairs.images.float() / 255
        self.tap = features = self.network(pixels)
        terms = {name: self._cross_entropy(name, features, pairs) for name in HEADS if name in self.wanted}
        if "reconstruction" in self.wanted:
            terms["reconstruction"] = squared_error(self.network.decoder(features).float(), pixels)
        return terms

    def _logits(self, head: str, features: Tensor) -> Tensor:
        return getattr(self.network, head)(features).float()

    def _cross_entropy(self, head: str, features: Tensor, pairs: Pairs) -> Tensor:
        return F.cross_entropy(self._logits(head, features), getattr(pairs, head))

    def _objective(self, images: Tensor, left: Tensor, right: Tensor) -> Tensor:
        features, pairs = self.network(images.float() / 255), Pairs(images, left, right)
        return torch.stack([self._cross_entropy(head, features, pairs) for head in HEADS]).mean()

    @torch.no_grad()
    def evaluate(self, split: str) -> Mapping[str, float]:
        """Both heads' means, each head's own, and the reconstruction's error, on the split's fixed pairs."""
        self.model.eval()
        pairs, sums = self.pairs[split], dict.fromkeys(("reconstruction", *_keys("loss"), *_keys("accuracy")), 0.0)
        for start in range(0, len(pairs), EVALUATION_BATCH):
            for name, value in self._sums(pairs.part(slice(start, start + EVALUATION_BATCH))).items():
                sums[name] += value
        self.model.train()
        means = {name: total / len(pairs) for name, total in sums.items()}
        both = {what: sum(means[key] for key in _keys(what)) / len(HEADS) for what in ("accuracy", "loss")}
        return {**both, **means}

    def _sums(self, pairs: Pairs) -> dict[str, float]:
        """Every metric, summed over the pairs."""
        pixels = pairs.images.float() / 255
        features = self.network(pixels)
        found = {"reconstruction": float(squared_error(self.network.decoder(features).float(), pixels)) * len(pixels)}
        for head in HEADS:
            logits, labels = self._logits(head, features), getattr(pairs, head)
            found[f"{head}_loss"] = float(F.cross_entropy(logits.double(), labels, reduction="sum"))
            found[f"{head}_accuracy"] = float((logits.argmax(1) == labels).sum())
        return found

    @torch.no_grad()
    def pictures(self) -> Mapping[str, Tensor]:
        """Pairs of the select split, and what the decoder makes of them."""
        self.model.eval()
        pixels = self.pairs["select"].images[:PICTURES].float() / 255
        again = self.network.decoder(self.network(pixels))
        self.model.train()
        return {"pairs": pixels, "reconstructions": again}

    def state_dict(self) -> dict[str, Any]:
        """The generator of the training pairs."""
        return {"pairing": self.pairing.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self.pairing.set_state(state["pairing"])


def _keys(what: str) -> tuple[str, ...]:
    return tuple(f"{head}_{what}" for head in HEADS)
