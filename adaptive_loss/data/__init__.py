"""Datasets, one file each: ``datasets.get(name)(data_dir, seed=…)`` gives a :class:`.base.Dataset` of images or a
:class:`.points.PointDataset`."""

from adaptive_loss.registry import Registry

datasets = Registry(
    "dataset", "adaptive_loss.data", aliases={"cifar10": "cifar10_loader"}, not_plugins=("base", "points", "augment")
)
