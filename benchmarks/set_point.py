"""A rate or a distortion that is asked for, and what the set-point laws hold when the loss's units change.

    python -m benchmarks.set_point

A VAE of 8×8 digits with squared error: distortion ½Σ(x − x̂)² an image, rate KL in nats an image. One of the two is the
base and the other is held at a target, by the law above the rules (``set_point``), GECO or ControlVAE's PI. Nothing
else is tuned: all start weights are 1 and every law has its defaults. Then one thing changes at a time:

- ``mean``: both terms are means over pixels and latents, and the target is in that unit;
- ``mean, declared``: the same, with ``reductions`` and the target in nats;
- ``latent x2``: 16 latents in place of 8;
- ``pixels x255``: images from 0 to 255, so that the distortion, and its target, are 65,025 times as great.

Held is what the mean of the last tenth of the training steps has within 5% of the target.
"""

from __future__ import annotations

import itertools
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Generator, Tensor

from adaptive_loss import LossExecutor
from adaptive_loss.data import datasets
from adaptive_loss.data.base import Batches
from adaptive_loss.models.vae import VAE
from adaptive_loss.records import csv_line, json_dump, provenance, write_atomic
from adaptive_loss.seeding import own_generator, seed_global
from adaptive_loss.tasks.vae import gaussian_kl
from adaptive_loss.units import Reduction
from adaptive_loss.utils.commands import command, command_line, parse

PROG = "python -m benchmarks.set_point"
PIXELS, LATENT, BATCH, RATE = 64, 8, 128, 2e-3
ASKED = {"rate": 8.0, "distortion": 1.0}
"""Nats an image, and ½Σ(x − x̂)² an image with pixels from 0 to 1."""
LAWS = {"set_point": "fixed", "geco": "geco", "pi": "pi"}
WITHIN = 0.05


@dataclass(frozen=True, kw_only=True)
class Flags:
    """The flags of the benchmark."""

    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    """Seeds; every case runs each of them."""
    laws: tuple[Literal["set_point", "geco", "pi"], ...] = ("set_point", "geco", "pi")
    """What holds the target."""
    epochs: int = 100
    """Passes over 1,000 images, seven steps each."""
    output_dir: Path = Path("results/set_point")
    """Where table.csv and table.json go."""


@dataclass(frozen=True)
class Change:
    """How a run differs from the plain one."""

    latent: int = LATENT
    scale: float = 1.0
    mean: bool = False
    declared: bool = False


CHANGES = {
    "as is": Change(),
    "mean": Change(mean=True),
    "mean, declared": Change(mean=True, declared=True),
    "latent x2": Change(latent=2 * LATENT),
    "pixels x255": Change(scale=255.0),
}


@dataclass(frozen=True)
class Case:
    """What is held, by which law, under which change."""

    held: Literal["rate", "distortion"]
    law: str
    change: str

    @property
    def how(self) -> Change:
        """The change."""
        return CHANGES[self.change]

    @property
    def target(self) -> float:
        """In the unit that the executor is told of: the term's own, or nats where its reduction is declared."""
        how, asked = self.how, ASKED[self.held]
        asked = asked * how.scale**2 if self.held == "distortion" else asked
        return asked / self.size if how.mean and not how.declared else asked

    @property
    def size(self) -> int:
        """Values an image of the term that is held."""
        return self.how.latent if self.held == "rate" else PIXELS

    def executor(self, steps: int, seed: int) -> LossExecutor:
        """The base is the other term; all weights start from 1."""
        sizes = {"distortion": PIXELS, "rate": self.how.latent}
        reductions = {name: Reduction("mean", dimensions=size) for name, size in sizes.items()}
        return LossExecutor(
            {"distortion": 1.0, "rate": 1.0},
            base="distortion" if self.held == "rate" else "rate",
            targets={self.held: self.target},
            weighting=LAWS[self.law],
            reductions=reductions if self.how.declared else None,
            total_steps=steps,
            seed=seed,
        )

    def losses(self, model: VAE, images: Tensor, noise: Generator) -> dict[str, Tensor]:
        """Distortion and rate of images with values from 0 to 1, in the units of the change."""
        logits, mean, log_variance = model(images, noise)
        errors = (self.how.scale * (logits.sigmoid() - images)).square().sum(1).mean() / 2
        sums = {"distortion": errors, "rate": gaussian_kl(mean, log_variance)}
        sizes = {"distortion": PIXELS, "rate": self.how.latent}
        return {name: sums[name] / sizes[name] for name in sums} if self.how.mean else sums

    def relative(self, loss: float) -> float:
        """A loss of the held term as a multiple of its target."""
        return loss * (self.size if self.how.declared else 1) / self.target


def cases() -> Iterator[Case]:
    """Every law of what it can hold: PI's weight lies within 0 and 1 and is made for the rate."""
    for held, law, change in itertools.product(ASKED, LAWS, CHANGES):
        if law != "pi" or held == "rate":
            yield Case(held, law, change)  # pyright: ignore[reportArgumentType]


def run(case: Case, seed: int, epochs: int) -> dict[str, Any]:
    """Train once: the held term as a multiple of its target, over the last tenth of the steps and on the test split."""
    seed_global(seed)
    data = datasets.get("digits")(None, seed=0)
    train, test = (split.images.flatten(1).float() / 255 for split in (data.train, data.test))
    model, noise = VAE(PIXELS, latent=case.how.latent), own_generator(seed, "latent")
    batches = Batches(len(train), BATCH, own_generator(seed, "order"))
    executor = case.executor(epochs * len(batches), seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    seen = []
    for _ in range(epochs):
        for rows in batches:
            losses = case.losses(model, train[rows], noise)
            optimizer.zero_grad()
            executor(losses).backward()
            executor.step(optimizer)
            seen.append(losses[case.held].item())
    with torch.no_grad():
        on_test = float(case.losses(model, test, own_generator(seed, "evaluate test"))[case.held])
    last = seen[-max(1, len(seen) // 10) :]
    return {
        **asdict(case),
        "seed": seed,
        "asked": case.target,
        "reached": case.relative(statistics.fmean(last)),
        "on_test": case.relative(on_test),
        "weight": executor.weights[case.held],
        "skipped": executor.skipped_steps,
    }


def held(row: Mapping[str, Any]) -> bool:
    """Whether the target was met."""
    return abs(row["reached"] - 1) <= WITHIN


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line a case: reached over asked (mean and the seed that is farthest off), on test, the weight, seeds held."""
    names = f"{'asked':>10}{'reached':>9}{'farthest':>10}{'on test':>9}{'weight':>10}{'held':>7}"
    lines = [f"{'held':<12}{'law':<12}{'change':<16}{names}"]
    for key in dict.fromkeys((row["held"], row["law"], row["change"]) for row in rows):
        own = [row for row in rows if (row["held"], row["law"], row["change"]) == key]
        reached, on_test, weight = (
            statistics.fmean(row[name] for row in own) for name in ("reached", "on_test", "weight")
        )
        farthest = max((row["reached"] for row in own), key=lambda value: abs(value - 1))
        place = f"{key[0]:<12}{key[1]:<12}{key[2]:<16}{own[0]['asked']:>10.5g}"
        numbers = f"{reached:>9.3f}{farthest:>10.3f}{on_test:>9.3f}{weight:>10.3g}"
        lines.append(f"{place}{numbers}{sum(map(held, own)):>4} of {len(own)}")
    return "\n".join(lines)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    flags = parse(Flags, argv, PROG, "What the set-point laws hold when the units of the loss change.")
    torch.set_num_threads(1)
    rows = []
    for case in (case for case in cases() if case.law in flags.laws):
        rows += [run(case, seed, flags.epochs) for seed in flags.seeds]
        print(f"{case.held}, {case.law}, {case.change}: done", file=sys.stderr, flush=True)
    document = {"rows": rows, "provenance": provenance(command_line(PROG, argv))}
    write_atomic(flags.output_dir / "table.json", json_dump(document))
    write_atomic(flags.output_dir / "table.csv", "".join(csv_line(line) for line in (rows[0], *map(dict.values, rows))))
    print(table(rows))
    if len(flags.seeds) < 5:
        print("Warning: fewer than five seeds prove nothing")
    return 0


if __name__ == "__main__":
    sys.exit(main())
