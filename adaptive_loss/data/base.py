"""What every dataset gives: uint8 images in four fixed splits, and the order in which they are visited.

Train is what the optimizer sees, probe what the look-ahead and rewards see, select what chooses the epoch, and
test what is read once at the end. Images stay uint8 until a batch is normalised, so 5,000 of them cost 15 MB.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Generator, Tensor

from adaptive_loss.errors import UsageError

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Split:
    """Images and their labels.

    Attributes:
        images: uint8 ``[N, C, H, W]``, values 0 to 255.
        labels: int64 ``[N]``.

    Raises:
        TypeError: images are not uint8 or labels not int64.
        ValueError: the shapes do not fit together.
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.labels.dtype != torch.int64:
            raise TypeError(
                f"a split holds uint8 images and int64 labels, not {self.images.dtype} and {self.labels.dtype}"
            )
        if self.images.ndim != 4 or self.labels.shape != self.images.shape[:1]:
            raise ValueError(
                "a split holds images [N, C, H, W] and labels [N], "
                f"not {list(self.images.shape)} and {list(self.labels.shape)}"
            )

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class Dataset:
    """A classification dataset in its four splits.

    Attributes:
        name: the short name, as reports print it ("cifar10").
        classes: the class names; label ``i`` is ``classes[i]``.
        train, probe, select, test: disjoint splits.
        provenance: where the data came from: ``source``, ``licence`` and ``sha256`` of what was read, at least.
        mean, std: float32 ``[C]`` of the **train** split's pixels, in units of full scale (0 to 1). They are
            computed here, so no other split can leak into them.

    Example:
        >>> from adaptive_loss.data import datasets
        >>> digits = datasets.get("digits")(seed=1)
        >>> len(digits.train), len(digits.held_in), digits.image_shape
        (1000, 1300, (1, 8, 8))
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    probe: Split
    select: Split
    test: Split
    provenance: dict[str, object]
    mean: Tensor = field(init=False)
    std: Tensor = field(init=False)

    def __post_init__(self) -> None:
        mean, std = channel_statistics(self.train.images)
        object.__setattr__(self, "mean", mean)
        object.__setattr__(self, "std", std)

    @cached_property
    def held_in(self) -> Split:
        """Train, probe and select as one split, for an arm that holds nothing out but the test set."""
        parts = (self.train, self.probe, self.select)
        return Split(torch.cat([part.images for part in parts]), torch.cat([part.labels for part in parts]))

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """``(C, H, W)`` of one image."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width


def channel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    r"""Mean and standard deviation of each channel, in units of full scale (0 to 1).

    With :math:`n_{cv}` the number of pixels of channel :math:`c` that have the value :math:`v`,
    :math:`\mu_c = \sum_v v\,n_{cv} / \sum_v n_{cv}`, and :math:`\sigma_c` likewise. Counting values is exact and
    needs no float copy of the images. A constant channel gets :math:`\sigma_c = 1`, so that it can be divided by.

    Args:
        images: uint8 ``[N, C, H, W]``, N at least 1.

    Returns:
        ``(mean, std)``, float32 ``[C]`` each.

    Raises:
        ValueError: there is no pixel to count.
    """
    if not images.numel():
        raise ValueError("mean and standard deviation need at least one image")
    values = torch.arange(256, dtype=torch.float64) / 255
    counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(1)])
    share = counts.double() / counts.sum(1, keepdim=True)
    mean = share @ values
    std = (share * (values - mean[:, None]).square()).sum(1).sqrt()
    return mean.float(), torch.where(std > 0, std, 1.0).float()


SMALLEST_SUBSET = 10


def split_sizes(subset: int) -> dict[str, int]:
    """80 / 10 / 10 % of ``subset`` images for train, probe and select; :class:`UsageError` below 10 images.

    Example:
        >>> split_sizes(5000)
        {'train': 4000, 'probe': 500, 'select': 500}
    """
    if subset < SMALLEST_SUBSET:
        raise UsageError(f"--subset {subset} is too small to split; use {SMALLEST_SUBSET} or more")
    held_out = subset // 10
    return {"train": subset - 2 * held_out, "probe": held_out, "select": held_out}


def stratified_splits(
    labels: Tensor,
    sizes: Mapping[str, int],
    generator: Generator,
    *,
    classes: Sequence[str] = (),
    flag: str = "--subset",
) -> dict[str, Tensor]:
    """Disjoint, class-balanced, shuffled index sets.

    Within a split the classes' counts differ by at most one, and so do they over all splits together; where a size
    is no multiple of the number of classes, the classes with most images give the extra ones.

    Args:
        labels: int64 ``[N]``, values from 0.
        sizes: how many images each split gets, by name.
        generator: draws which images, and their order.
        classes: class names, for the number of classes and for messages; default as many as the labels show.
        flag: the command's flag that set the sizes, for messages.

    Returns:
        int64 indices into ``labels``, by split name.

    Raises:
        UsageError: a class has too few images; the message gives the largest balanced size.
        ValueError: a size is negative.

    Example:
        >>> import torch
        >>> labels = torch.arange(40) % 4
        >>> parts = stratified_splits(labels, {"train": 20, "probe": 8}, torch.Generator().manual_seed(0))
        >>> torch.bincount(labels[parts["probe"]]).tolist()
        [2, 2, 2, 2]
    """
    if min(sizes.values(), default=0) < 0:
        raise ValueError(f"split sizes must not be negative: {dict(sizes)}")
    number = len(classes) or (int(labels.max()) + 1 if len(labels) else 1)
    members = [_shuffled(torch.nonzero(labels == label).flatten(), generator) for label in range(number)]
    counts = torch.tensor([len(member) for member in members])
    richest_first = torch.argsort(counts, descending=True, stable=True).tolist()
    quotas = _quotas(sizes, richest_first)
    _check_counts(counts.tolist(), quotas, sum(sizes.values()), classes, flag)
    taken = [0] * number
    splits: dict[str, Tensor] = {}
    for name, quota in quotas.items():
        parts = [members[label][taken[label] : taken[label] + quota[label]] for label in range(number)]
        taken = [before + more for before, more in zip(taken, quota, strict=True)]
        splits[name] = _shuffled(torch.cat(parts), generator)
    return splits


def _shuffled(indices: Tensor, generator: Generator) -> Tensor:
    return indices[torch.randperm(len(indices), generator=generator)]


def _quotas(sizes: Mapping[str, int], order: Sequence[int]) -> dict[str, list[int]]:
    """Images of each class in each split; odd ones go round the classes in ``order``, across splits."""
    number, turn = len(order), 0
    quotas: dict[str, list[int]] = {}
    for name, size in sizes.items():
        quota = [size // number] * number
        for _ in range(size % number):
            quota[order[turn % number]] += 1
            turn += 1
        quotas[name] = quota
    return quotas


def _check_counts(
    counts: Sequence[int], quotas: Mapping[str, Sequence[int]], total: int, classes: Sequence[str], flag: str
) -> None:
    for label, count in enumerate(counts):
        need = sum(quota[label] for quota in quotas.values())
        if need > count:
            name = classes[label] if classes else str(label)
            raise UsageError(
                f"{flag} {total} needs {need} images of each class but class {name!r} has {count}; "
                f"the largest balanced size is {min(counts) * len(counts)}"
            )


class Batches:
    """The batches of an epoch as index tensors, in an order drawn anew from its own generator each epoch.

    A run that was cut resumes in mid-epoch: the state is the generator as it was when the epoch began and the number
    of batches handed out since, and the next loop after ``load_state_dict`` finishes that epoch. A ``DataLoader`` may
    take its batches from here and is then looped over with :meth:`through`.

    Args:
        n: number of examples.
        batch_size: examples a batch.
        generator: used by nothing else but the ``DataLoader`` on top, if there is one.
        drop_last: leave out a last batch that is not full.

    Raises:
        UsageError: the batch is empty or, with ``drop_last``, larger than the data, so that no batch would come.

    Example:
        >>> import torch
        >>> batches = Batches(10, 4, torch.Generator().manual_seed(0))
        >>> [len(index) for index in batches]
        [4, 4]
    """

    def __init__(self, n: int, batch_size: int, generator: Generator, drop_last: bool = True) -> None:
        if batch_size < 1:
            raise UsageError(f"--batch-size {batch_size} must be at least 1")
        if n < (batch_size if drop_last else 1):
            raise UsageError(f"--batch-size {batch_size} is larger than the {n} training images; use at most {n}")
        self.n, self.batch_size, self.drop_last = n, batch_size, drop_last
        self.generator = generator
        self._epoch_start = generator.get_state()
        self._position = 0
        self._resuming = False

    def __len__(self) -> int:
        return self.n // self.batch_size if self.drop_last else -(-self.n // self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        # A loop left by `break` starts over with a fresh epoch; only a loaded state continues one.
        first = self._position if self._resuming else 0
        self._resuming = False
        self._epoch_start = self.generator.get_state()
        order = torch.randperm(self.n, generator=self.generator)
        self._position = first
        for batch in range(first, len(self)):
            self._position = batch + 1
            yield order[batch * self.batch_size : (batch + 1) * self.batch_size]
        self._epoch_start, self._position = self.generator.get_state(), 0

    def through(self, loader: Iterable[T]) -> Iterator[T]:
        """What ``loader`` makes of these batches, each counted when it is handed out here.

        Its workers fetch batches ahead; counted there, those would be lost on a resume. What workers draw themselves
        is the same again only from an epoch's start, so draw in the loop, or from a seed made of epoch and index.

        Args:
            loader: ``DataLoader(data, batch_sampler=batches, generator=batches.generator, num_workers=2)``.

        Raises:
            ValueError: a ``DataLoader`` with another generator, whose draws at its start a resume would not repeat.
        """
        if getattr(loader, "generator", self.generator) is not self.generator:
            raise ValueError("make the DataLoader with generator=batches.generator, so that a resume draws the same")
        first = self._position if self._resuming else 0
        start = self.generator.get_state()
        for position, item in enumerate(loader, first + 1):
            self._epoch_start, self._position = start, position
            yield item
        self._epoch_start, self._position = self.generator.get_state(), 0

    def state_dict(self) -> dict[str, Any]:
        """The generator's state at the start of the epoch and the batches handed out since."""
        return {
            "generator": self._epoch_start.clone(),
            "position": self._position,
            "n": self.n,
            "batch_size": self.batch_size,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state`` was taken; another data or batch size raises ``ValueError``."""
        if (state["n"], state["batch_size"]) != (self.n, self.batch_size):
            raise ValueError(
                f"the saved order is of {state['n']} images in batches of {state['batch_size']}, "
                f"not of {self.n} in batches of {self.batch_size}"
            )
        self._epoch_start = torch.as_tensor(state["generator"]).clone()
        self.generator.set_state(self._epoch_start)
        self._position = int(state["position"])
        self._resuming = True
