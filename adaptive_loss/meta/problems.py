"""Small training runs to meta-train on: random data, terms and wrong start weights, a fraction of a second each."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from adaptive_loss.data.base import Split
from adaptive_loss.data.digits import load as load_digits
from adaptive_loss.loss_executor import LossExecutor
from adaptive_loss.meta_controller import ControllerLaw, MetaController
from adaptive_loss.models.vae import VAE
from adaptive_loss.probes import held_out
from adaptive_loss.seeding import own_generator
from adaptive_loss.tasks.classify import confidence_penalty, mixed_cross_entropy
from adaptive_loss.tasks.vae import bernoulli_reconstruction, gaussian_kl

STEPS = 150
BATCH = 64
PROBE_BATCH = 32
WRONG = 2.0
"""Start weights are wrong by up to 10 to this power, either way."""


@dataclass
class Problem:
    """One training run to be: a model, its terms, its objective and the number it is judged by.

    Args:
        model: what is trained.
        terms: training rows → named losses.
        n_train: number of training examples.
        weights: start weights, the base first.
        probe: the objective on the probe part.
        judge: the final loss on the part that nothing else reads.
        learning_rate: of Adam.
    """

    model: nn.Module
    terms: Callable[[Tensor], Mapping[str, Tensor]]
    n_train: int
    weights: dict[str, float]
    probe: held_out
    judge: Callable[[], Tensor]
    learning_rate: float


def train(problem: Problem, law: ControllerLaw, seed: int) -> float:
    """Train once under ``law``; the final loss on the judging part, or infinity where the run was lost."""
    executor = LossExecutor(
        problem.weights,
        base=next(iter(problem.weights)),
        modulators=(MetaController(law),),
        probe=problem.probe,
        total_steps=STEPS,
    )
    optimizer = torch.optim.Adam(problem.model.parameters(), lr=problem.learning_rate)
    order = own_generator(seed, "order")
    try:
        for _ in range(STEPS):
            rows = torch.randint(problem.n_train, (BATCH,), generator=order)
            optimizer.zero_grad()
            executor(problem.terms(rows)).backward()
            executor.step(optimizer)
    except RuntimeError:
        return math.inf
    problem.model.eval()
    with torch.no_grad():
        return float(problem.judge())


def sample(family: str, seed: int) -> Problem:
    """The problem of that family and seed; the same arguments give the same problem, initialisation included."""
    dice = own_generator(seed, family)
    with torch.random.fork_rng():
        torch.manual_seed(dice.initial_seed())
        return FAMILIES[family](dice)


def classifier(dice: Generator) -> Problem:
    """Digits with mixup (helpful), confidence penalty, label noise (harmful) and feature size (irrelevant)."""
    data = load_digits(seed=int(torch.randint(1000, (), generator=dice)))
    images, labels = _flat(data.train), data.train.labels
    keep = torch.randperm(len(images), generator=dice)[: int(_between(150, 900, dice))]
    images, labels = images[keep], labels[keep]
    noisy = torch.randint(10, labels.shape, generator=dice)
    hidden = int(_between(24, 96, dice))
    body, head = nn.Sequential(nn.Linear(64, hidden), nn.ReLU()), nn.Linear(hidden, 10)
    model = nn.Sequential(body, head)
    mixing = torch.Generator().manual_seed(dice.initial_seed() ^ 1)

    def terms(rows: Tensor) -> Mapping[str, Tensor]:
        x, y = images[rows], labels[rows]
        features = body(x)
        log_p = F.log_softmax(head(features), 1)
        share, partners = torch.rand((), generator=mixing), torch.randperm(len(rows), generator=mixing)
        mixed = model(share * x + (1 - share) * x[partners])
        return {
            "cross_entropy": F.nll_loss(log_p, y),
            "mixup": mixed_cross_entropy(mixed, y, y[partners], share),
            "confidence": confidence_penalty(log_p),
            "label_noise": F.nll_loss(log_p, noisy[rows]),
            "feature_size": features.square().mean(),
        }

    names = ("mixup", "confidence", "label_noise", "feature_size")
    probe = held_out(lambda x, y: F.cross_entropy(model(x), y), (_flat(data.probe), data.probe.labels))
    return Problem(
        model,
        terms,
        len(images),
        _wrong_weights("cross_entropy", names, dice),
        _drawn(probe, dice),
        lambda: F.cross_entropy(model(_flat(data.select)), data.select.labels),
        10 ** _between(-3, -2, dice),
    )


def autoencoder(dice: Generator) -> Problem:
    """A VAE on digits whose KL has a wrong weight, judged by −ELBO."""
    data = load_digits(seed=int(torch.randint(1000, (), generator=dice)))
    pixels = _flat(data.train)
    model = VAE(64, latent=int(_between(2, 12, dice)), hidden=int(_between(32, 96, dice)))
    noise = torch.Generator().manual_seed(dice.initial_seed() ^ 1)

    def parts(x: Tensor, source: Generator) -> dict[str, Tensor]:
        logits, mean, log_variance = model(x, source)
        return {"reconstruction": bernoulli_reconstruction(logits, x), "kl": gaussian_kl(mean, log_variance)}

    def objective(x: Tensor, source: Generator) -> Tensor:
        found = parts(x, source)
        return found["reconstruction"] + found["kl"]

    probe = held_out(lambda x: objective(x, probe.generator), _flat(data.probe))
    return Problem(
        model,
        lambda rows: parts(pixels[rows], noise),
        len(pixels),
        _wrong_weights("reconstruction", ("kl",), dice),
        _drawn(probe, dice),
        lambda: objective(_flat(data.select), torch.Generator().manual_seed(0)),
        10 ** _between(-3, -2, dice),
    )


def regression(dice: Generator) -> Problem:
    """A noisy target with few examples, a related task (helpful), an unrelated one and its own negative (harmful)."""
    n_train, width = int(_between(60, 400, dice)), 12
    inputs = torch.randn(n_train + 400, width, generator=dice)
    shared = torch.tanh(inputs @ torch.randn(width, 6, generator=dice) / 2)
    mix = torch.randn(6, 3, generator=dice)
    main, other = shared @ mix[:, :1], inputs @ torch.randn(width, 1, generator=dice) / 3
    related = shared @ (mix[:, :1] + 0.3 * mix[:, 1:2])
    noise = _between(0.1, 1.0, dice)
    target = main + noise * torch.randn(main.shape, generator=dice)
    goals = {"fit": target, "related": related, "unrelated": other, "opposed": -target}
    hidden = int(_between(16, 64, dice))
    model = nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, 3))
    columns = {"fit": 0, "related": 1, "unrelated": 2, "opposed": 0}

    def terms(rows: Tensor) -> Mapping[str, Tensor]:
        outputs = model(inputs[rows])
        return {name: (outputs[:, c] - goals[name][rows, 0]).square().mean() for name, c in columns.items()}

    def error(x: Tensor, y: Tensor) -> Tensor:
        return (model(x)[:, :1] - y).square().mean()

    held, judged = slice(n_train, n_train + 100), slice(n_train + 100, None)
    return Problem(
        model,
        terms,
        n_train,
        _wrong_weights("fit", ("related", "unrelated", "opposed"), dice),
        _drawn(held_out(error, (inputs[held], target[held])), dice),
        lambda: error(inputs[judged], main[judged]),
        10 ** _between(-2.7, -1.7, dice),
    )


FAMILIES: dict[str, Callable[[Generator], Problem]] = {
    "classifier": classifier,
    "autoencoder": autoencoder,
    "regression": regression,
}


def _flat(split: Split | Tensor) -> Tensor:
    images = split.images if isinstance(split, Split) else split
    return images.flatten(1).float() / 255


def _between(low: float, high: float, dice: Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=dice))


def _wrong_weights(base: str, names: tuple[str, ...], dice: Generator) -> dict[str, float]:
    return {base: 1.0} | {name: 10 ** _between(-WRONG, WRONG, dice) for name in names}


def _drawn(probe: held_out, dice: Generator) -> held_out:
    probe.batch_size = min(PROBE_BATCH, probe.batch_size)
    probe.generator.manual_seed(dice.initial_seed() ^ 2)
    return probe
