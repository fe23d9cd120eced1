"""Features of images in small classifiers of our own, two a dataset: one to adapt by, another to judge by.

    python -m adaptive_loss.metrics.features --dataset fashion_mnist

trains both anew: same seed, same files. ``probe`` is for :class:`adaptive_loss.probes.sample_quality`; ``judge``, of
another design and from another seed, is for metrics, so that nothing is judged by what it was adapted to. Metrics in
these features are **not comparable with FID or KID in Inception features**.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors.torch import load, save
from torch import Tensor

from adaptive_loss.data import datasets
from adaptive_loss.data.base import Batches, Dataset, Split
from adaptive_loss.errors import RunError, UsageError
from adaptive_loss.models.feature_cnn import FeatureCNN
from adaptive_loss.records import json_dump, write_atomic
from adaptive_loss.seeding import own_generator
from adaptive_loss.utils.commands import command, parse

PROG = "python -m adaptive_loss.metrics.features"
WEIGHTS = Path(__file__).parent / "weights"
Role = Literal["probe", "judge"]
DESIGNS: dict[Role, dict[str, Any]] = {
    "probe": {"widths": [16, 32], "style": "smooth"},
    "judge": {"widths": [24, 48], "style": "sharp"},
}
BATCH = 100
LEARNING_RATE = 2e-3
DEAD = 1e-6  # a feature that never moves is left as it is, not blown up


@dataclass(frozen=True)
class Recipe:
    """What a dataset's two networks are trained with."""

    subset: int
    epochs: int
    features: int


RECIPES = {
    "digits": Recipe(subset=1300, epochs=40, features=32),
    "fashion_mnist": Recipe(subset=60_000, epochs=3, features=64),
}


@dataclass(frozen=True, kw_only=True)
class Flags:
    """Train the feature networks of one dataset."""

    dataset: str = "digits"
    """digits or fashion_mnist."""
    data_dir: Path = Path("data")
    """Where the data is, or is downloaded to."""
    seed: int = 0
    """Seed of the split, and from which both networks' own seeds come."""
    output: Path = WEIGHTS
    """The folder for <dataset>_<role>.safetensors and its .json card."""


def has_features(dataset: str, folder: Path = WEIGHTS) -> bool:
    """Whether networks for ``dataset`` come with the package."""
    return all((folder / f"{dataset}_{role}.json").is_file() for role in DESIGNS)


def load_features(dataset: str, role: Role, folder: Path = WEIGHTS) -> FeatureCNN:
    """The frozen network of ``dataset`` for ``role``; its ``features`` takes images ``[N, C, H, W]`` in 0 to 1.

    Gradients pass through it to the images, and none reach its weights.

    Args:
        dataset: "digits" or "fashion_mnist".
        role: "probe" to adapt by, "judge" to measure by.
        folder: where the files are.

    Raises:
        UsageError: there is no network for that dataset or role.
        RunError: its file is missing or damaged.

    Example:
        >>> network = load_features("digits", "judge")
        >>> network.features(torch.rand(2, 1, 8, 8)).shape
        torch.Size([2, 32])
    """
    name = f"{dataset.replace('-', '_')}_{role}"
    if not (folder / f"{name}.json").is_file():
        raise UsageError(f"no {role!r} features for {dataset!r}; choose a dataset from: {', '.join(RECIPES)}")
    file = folder / f"{name}.safetensors"
    try:
        card = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        weights = file.read_bytes()
    except (OSError, ValueError) as error:
        raise RunError(f"cannot read {file} and its card ({error}); reinstall the package") from error
    if hashlib.sha256(weights).hexdigest() != card.get("sha256"):
        raise RunError(f"{file} is damaged: its SHA-256 is not its card's; reinstall the package")
    network = FeatureCNN(**card["architecture"])
    network.load_state_dict(load(weights))
    return network.eval().requires_grad_(False)


def train(data: Dataset, role: Role, recipe: Recipe, seed: int) -> FeatureCNN:
    """A classifier of all held-in images, frozen, with its features standardised over them."""
    torch.manual_seed(own_generator(seed, f"features {role}").initial_seed())
    network = FeatureCNN(data.image_shape, len(data.classes), features=recipe.features, **DESIGNS[role])
    network.pixel_mean.copy_(data.mean)
    network.pixel_std.copy_(data.std)
    batches = Batches(len(data.held_in), BATCH, own_generator(seed, f"order {role}"))
    optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.epochs * len(batches))
    for _ in range(recipe.epochs):
        for rows in batches:
            optimizer.zero_grad()
            F.cross_entropy(network(pixels(data.held_in.images[rows])), data.held_in.labels[rows]).backward()
            optimizer.step()
            scheduler.step()
    network.eval().requires_grad_(False)
    found = torch.cat([network.features(pixels(images)) for images in data.held_in.images.split(1000)])
    network.feature_mean.copy_(found.mean(0))
    spread = found.std(0)
    network.feature_std.copy_(torch.where(spread > DEAD, spread, 1.0))
    return network


def pixels(images: Tensor) -> Tensor:
    """Bytes as floats in 0 to 1."""
    return images.float() / 255


def accuracy(network: FeatureCNN, split: Split) -> float:
    """Share of images put into their class."""
    right = sum(
        int((network(pixels(images)).argmax(1) == labels).sum())
        for images, labels in zip(split.images.split(1000), split.labels.split(1000), strict=True)
    )
    return right / len(split)


def write(network: FeatureCNN, role: Role, data: Dataset, flags: Flags) -> Mapping[str, Any]:
    """Write the weights and their card; the card."""
    recipe = RECIPES[data.name]
    weights = save({name: value.contiguous() for name, value in network.state_dict().items()})
    shape = {"image_shape": list(data.image_shape), "classes": len(data.classes), "features": recipe.features}
    card = {
        "what": "a classifier whose features compare images; not comparable with Inception features",
        "role": role,
        "data": {**data.provenance, "images": len(data.held_in)},
        "architecture": shape | DESIGNS[role],
        "epochs": recipe.epochs,
        "seed": flags.seed,
        "test_accuracy": accuracy(network, data.test),
        "made_by": f"{PROG} --dataset {data.name} --seed {flags.seed}",
        "torch": torch.__version__.partition("+")[0],
        "sha256": hashlib.sha256(weights).hexdigest(),
    }
    write_atomic(flags.output / f"{data.name}_{role}.safetensors", weights)
    write_atomic(flags.output / f"{data.name}_{role}.json", json_dump(card))
    return card


@command
def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    flags = parse(Flags, argv, PROG, "Train the feature networks of one dataset.")
    name = flags.dataset.replace("-", "_")
    if name not in RECIPES:
        raise UsageError(f"--dataset {flags.dataset}: no recipe for it; choose from: {', '.join(RECIPES)}")
    torch.set_num_threads(1)  # sums in one order: the same file again
    data = datasets.get(name)(flags.data_dir, seed=flags.seed, subset=RECIPES[name].subset)
    for role in DESIGNS:
        card = write(train(data, role, RECIPES[name], flags.seed), role, data, flags)
        print(f"{name} {role}: test accuracy {card['test_accuracy']:.4f}; written to {flags.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
