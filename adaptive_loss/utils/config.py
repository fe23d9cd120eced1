"""What one training run is: a typed, saved and loaded configuration. Imports no torch."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from adaptive_loss.errors import UsageError

# Where the data lies, what computes and how a run is kept do not change what it is, so they may differ on resume.
NOT_IDENTITY = ("data_dir", "device", "threads", "save_every", "pictures_every", "resume", "preempt_file")
# Fields that name a plug-in; written with hyphens they mean the same, so they are the same run.
NAMES = ("task", "dataset", "model", "objective", "weighting", "mode")
LARGEST_SEED = 2**64 - 1  # what torch's generators take
MOST_THREADS = 1024  # far more bring down the process


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the runs of one study share; every command that trains takes these as flags."""

    task: str = "classify"
    """What is learned: a file name in adaptive_loss/tasks."""
    dataset: str = "cifar10"
    """Which images: cifar10, fashion_mnist (each downloaded once) or digits (embedded)."""
    model: str | None = None
    """What is trained, a file name in adaptive_loss/models; None is the task's own choice."""
    objective: str | None = None
    """What the weights are adapted to; None is the task's first. For vae: elbo or sample_quality."""
    epochs: int = 25
    """Passes over the training split."""
    batch_size: int = 128
    """Images a step."""
    lr: float = 1e-3
    """Learning rate of Adam at the start; the one-cycle schedule peaks at three times it."""
    weights: dict[str, float] = field(default_factory=dict)
    """Start weights; a term not named starts from 1."""
    targets: dict[str, float] = field(default_factory=dict)
    """Values to hold terms at, in their own units, by the weighting rule or, where it has no such law, above it."""
    weighting: str = "fixed"
    """Base weighting rule: a file name in adaptive_loss/weighting."""
    policy: Path | None = None
    """Folder of a trained policy, which the modes that have controller or monitor take; None is the package's own."""
    augment: Literal["standard", "none"] = "standard"
    """Augmentation of the training images."""
    subset: int | None = None
    """Images used for train, probe and select together; None is the dataset's own number."""
    data_seed: int = 0
    """Seed of the subset and its splits; the same for every run of a study."""
    data_dir: Path = Path("data")
    """Where the data is, or is downloaded to."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """What trains: auto takes CUDA where there is one."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic: auto takes bf16 where the processor has it."""
    threads: int = 1
    """CPU threads a run; 0 is one a core."""
    save_every: str = "30s"
    """How often an unfinished run is saved: steps (200) or seconds (30s)."""
    pictures_every: int = 0
    """Steps from one set of pictures to the next, for tasks that have some; 0 is at the end only."""
    resume: bool = True
    """Go on where an unfinished run was saved; --no-resume begins it anew."""
    preempt_file: Path | None = None
    """When this file appears, every run saves and the command ends with code 143."""

    def __post_init__(self) -> None:
        for name in NAMES:
            if (value := getattr(self, name, None)) is not None:
                object.__setattr__(self, name, value.replace("-", "_"))


@dataclass(frozen=True, kw_only=True)
class RunConfig(Settings):
    """One training run, entirely."""

    mode: str = "baseline"
    """What adapts the weights: a file name in adaptive_loss/modes."""
    seed: int = 42
    """Seed of initialisation, order and augmentation."""
    read_test: bool = True
    """Read the test split once, at the end; a search over settings leaves it unread."""
    schedule: list[dict[str, float]] = field(default_factory=list)
    """What the rule ``replay`` plays back: points of a finished run, as in its result.json."""


def run_config(settings: Settings, *, mode: str, seed: int, **changes: Any) -> RunConfig:
    """The run that ``settings`` (or any dataclass that extends them) describe, with that mode and seed."""
    shared = {f.name: getattr(settings, f.name) for f in fields(Settings)}
    return RunConfig(**{**shared, "mode": mode, "seed": seed, **changes})


def validate(config: RunConfig) -> None:
    """Raise :class:`UsageError`, naming the flag and the fix, for anything that can be known before training."""
    for name in ("epochs", "batch_size"):
        _check_positive(name, getattr(config, name), "a whole number of at least 1")
    _check_positive("lr", config.lr, "a finite number above 0, such as 1e-3")
    if config.pictures_every < 0:
        raise UsageError(f"--pictures-every is {config.pictures_every}; give a number of steps, or 0 for the end only")
    if config.subset is not None:
        _check_positive("subset", config.subset, "a whole number of at least 1")
    for name, most in (("threads", MOST_THREADS), ("seed", LARGEST_SEED), ("data_seed", LARGEST_SEED)):
        if not 0 <= getattr(config, name) <= most:
            raise UsageError(f"--{_flag(name)} is {getattr(config, name)}; give 0 to {most}")
    save_interval(config.save_every)
    _check_weights(config.weights)
    _check_targets(config.targets)
    _check_names(config)
    check_policy(config.policy, [config.mode])


def check_policy(policy: Path | None, used_by: Iterable[str]) -> None:
    """Raise :class:`UsageError` for a policy that one of these modes cannot take."""
    if policy is None:
        return
    if not policy.is_dir():
        raise UsageError(f"--policy {policy} is no folder; give the one that holds controller.json and monitor.json")
    from adaptive_loss.modes import modes

    for mode in dict.fromkeys(used_by):
        try:
            modes.get(mode)().modulators(policy)
        except ValueError as error:
            raise UsageError(f"--policy: {error}") from None


def start_weights(config: RunConfig, terms: Sequence[str]) -> dict[str, float]:
    """The start weight of every term in ``terms``: 1 unless ``--weights`` says otherwise.

    Raises:
        UsageError: a weight for a term that is not there, or no term left with a weight above 0.
    """
    unknown = [name for name in config.weights if name not in terms]
    if unknown:
        raise UsageError(f"--weights names the unknown term {unknown[0]!r}; choose from: {', '.join(terms)}")
    weights = {name: float(config.weights.get(name, 1.0)) for name in terms}
    if not any(weights.values()):
        raise UsageError("--weights leaves every term at 0; give at least one term a weight above 0")
    return weights


def held_targets(config: RunConfig, weights: Mapping[str, float], base: str | None) -> dict[str, float]:
    """The target of every term that ``--targets`` names.

    Args:
        config: the run.
        weights: the start weight of every term that may have a target, and of the base.
        base: the term whose weight stays put, if there is one.

    Raises:
        UsageError: a target for a term that is not there, for the base, or for a term that is off.
    """
    able = [name for name, weight in weights.items() if name != base and weight > 0]
    wrong = next((name for name in config.targets if name not in able), None)
    if wrong is not None:
        why = "has weight 0, so that nothing can hold it" if wrong in weights else "is unknown"
        why = "is the base term, whose weight stays put" if wrong == base else why
        raise UsageError(f"--targets names {wrong!r}, which {why}; choose from: {', '.join(able) or 'none'}")
    return {name: float(target) for name, target in config.targets.items()}


def save_interval(text: str) -> tuple[float, str]:
    """What ``--save-every`` asks for, as a number and ``"steps"`` or ``"seconds"``.

    Raises:
        UsageError: it is neither a whole number of steps nor a number of seconds, or not above 0.

    Example:
        >>> save_interval("200"), save_interval("0.5s")
        ((200.0, 'steps'), (0.5, 'seconds'))
    """
    unit = "seconds" if text.endswith("s") else "steps"
    try:
        value = float(text.removesuffix("s")) if unit == "seconds" else float(int(text))
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise UsageError(f"--save-every is {text!r}; give a number of steps such as 200, or seconds such as 30s")
    return value, unit


def resolve_device(device: str) -> str:
    """``"cpu"`` or ``"cuda"`` for what ``--device`` asked; :class:`UsageError` where CUDA is asked for and absent."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: no CUDA device is available here; use --device cpu or --device auto")
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


def core_count() -> int:
    """Cores this process may use, which in a container can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def to_json(config: Settings) -> dict[str, Any]:
    """A dictionary ready for ``json.dump``; :func:`from_json` reads it back equal."""
    values = {f.name: getattr(config, f.name) for f in fields(config)}
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def from_json(values: Mapping[str, Any]) -> RunConfig:
    """The configuration that :func:`to_json` wrote; :class:`UsageError` says what is unknown or damaged."""
    known = {f.name for f in fields(RunConfig)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise UsageError(f"unknown configuration field {unknown[0]!r}; the fields are: {', '.join(sorted(known))}")
    try:
        given = {name: values.get(name) for name in ("policy", "preempt_file")}
        typed = {
            **{name: None if path is None else Path(path) for name, path in given.items()},
            "data_dir": Path(values.get("data_dir", RunConfig.data_dir)),
            "weights": dict(values.get("weights", {})),
            "targets": dict(values.get("targets", {})),
        }
        return RunConfig(**{**values, **typed})
    except (TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"a stored configuration is damaged: {error}") from None


def differences(there: RunConfig, here: RunConfig) -> list[str]:
    """What makes two runs different ones, as ``"epochs 25 there, 30 here"``; empty for the same run."""
    pairs = [(f.name, getattr(there, f.name), getattr(here, f.name)) for f in fields(RunConfig)]
    changed = [(name, a, b) for name, a, b in pairs if a != b and name not in NOT_IDENTITY]
    return ["another schedule" if name == "schedule" else f"{name} {a} there, {b} here" for name, a, b in changed]


def _flag(name: str) -> str:
    return name.replace("_", "-")


def _check_positive(name: str, value: float, wanted: str) -> None:
    if not math.isfinite(value) or value <= 0:
        raise UsageError(f"--{_flag(name)} is {value}; give {wanted}")


def _check_weights(weights: Mapping[str, float]) -> None:
    for term, weight in weights.items():
        if not math.isfinite(weight) or weight < 0:
            raise UsageError(f"--weights {term}={weight}: a weight is a finite number of at least 0")


def _check_targets(targets: Mapping[str, float]) -> None:
    for term, target in targets.items():
        if not math.isfinite(target):
            raise UsageError(f"--targets {term}={target}: a target is a finite number, in the unit of its term")


def _check_names(config: RunConfig) -> None:
    # Imported here so that reading a configuration needs no other part of the library.
    from adaptive_loss.data import datasets
    from adaptive_loss.modes import modes
    from adaptive_loss.tasks import tasks
    from adaptive_loss.weighting import weightings

    choices = {"task": tasks, "dataset": datasets, "mode": modes, "weighting": weightings}
    for name, registry in choices.items():
        registry.resolve(getattr(config, name), flag=f"--{name}")
