"""What the executor costs beside a bare PyTorch loop with the same terms.

    python benchmarks/overhead.py [--steps 120] [--rule-steps 30] [--threads 1] [--json]

Small CNN, 3×32×32 images (random pixels: time does not depend on them), batch 128, five terms, Adam. Each arm takes
turns with the bare loop on one model in one process, as :mod:`benchmarks.clock` says; beside what an arm adds in the
parts that differ stands what whole steps show, and the bare loop comes against itself, which shows the noise. The full
system's steps are timed by kind (look-ahead, monitor decision, the rest), and its cost over a run is made up from the
measured kinds and the number of each that such a run has. The gates are timed alone, every guard on, beside losses and
gradients that cost nothing. A checkpoint is timed with all that a run of the full system carries, from the first call
to the last fsync; the median of 20. Last, whole epochs of the `baseline` mode as the studies train it, progress and
logs included, take turns with whole epochs of the bare loop; then comes every weighting rule beside the plain weighted
sum, as :mod:`benchmarks.rules` says.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adaptive_loss.checkpoint import Checkpoints
from adaptive_loss.data.base import Dataset, Split
from adaptive_loss.guards import Guards
from adaptive_loss.loss_executor import LossExecutor
from adaptive_loss.loss_monitor import LossMonitor
from adaptive_loss.meta_controller import MetaController
from adaptive_loss.tasks.classify import Classify
from adaptive_loss.trainer import loop
from adaptive_loss.trainer.training import Training, prepare
from adaptive_loss.utils.commands import command, parse
from adaptive_loss.utils.config import RunConfig
from adaptive_loss.utils.logging import RunLogger, progress
from adaptive_loss.utils.performance import peak_memory_mb

if not __package__:  # called by its path, so the folder above is not where modules are looked for
    sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import rules
from benchmarks.clock import Lap, Step, Watch, extra, extra_whole, take_turns

PROG = "python benchmarks/overhead.py"
BATCH = 128
RUN_LENGTH = 1000
WARM_UP = 10
RULES = ("fixed", "uncertainty", "dwa")


@dataclass(frozen=True, kw_only=True)
class Flags:
    """The flags of the benchmark."""

    steps: int = 120
    """Steps timed in each arm, after 10 to warm up."""
    rule_steps: int = 30
    """Steps timed for every weighting rule, after 3 to warm up; 0 leaves the rules out."""
    epochs: int = 6
    """Epochs of the baseline mode and of the bare loop; the fastest of each count."""
    threads: int = 1
    """CPU threads."""
    json: bool = False
    """Print one JSON document instead of a table."""


def random_images(count: int, seed: int) -> Split:
    """``count`` images of noise with labels."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return Split(images, torch.randint(10, (count,), generator=generator))


def noise(n_train: int) -> Dataset:
    """A dataset of noise in the shape of CIFAR-10."""
    sizes = {"train": n_train, "probe": 512, "select": 512, "test": 512}
    parts = {name: random_images(size, i) for i, (name, size) in enumerate(sizes.items())}
    return Dataset(name="noise", classes=tuple("0123456789"), provenance={}, **parts)


def build_task() -> Classify:
    """The classifier with its five terms on noise."""
    torch.manual_seed(0)
    return Classify(RunConfig(dataset="cifar10"), noise(512), torch.device("cpu"))


def batches() -> Iterator[Tensor]:
    """The rows of every step, the same for all arms."""
    generator = torch.Generator().manual_seed(0)
    while True:
        yield torch.randint(512, (BATCH,), generator=generator)


def bare_arm(task: Classify) -> Step:
    """The loop as people write it: Σ wᵢLᵢ, backward, step."""
    optimizer, rows = torch.optim.Adam(task.model.parameters()), batches()

    def step(watch: Watch) -> str:
        losses = task.losses(next(rows))
        optimizer.zero_grad()
        with watch:
            total = sum(1.0 * loss for loss in losses.values())
        total.backward()  # type: ignore[union-attr]
        with watch:
            optimizer.step()
        task.after_step()
        return "plain"

    return step


def executor_arm(task: Classify, full: bool, weighting: str = "fixed") -> Step:
    """The same loop through the executor: a rule alone, or the full system with its probe."""
    executor = LossExecutor(
        dict.fromkeys(task.terms, 1.0),
        base=task.base,
        weighting=weighting,
        modulators=(MetaController(), LossMonitor()) if full else (),
        probe=task.probe if full else None,
        total_steps=RUN_LENGTH,
    )
    optimizer, rows = torch.optim.Adam([*task.model.parameters(), *executor.parameters()]), batches()

    def step(watch: Watch) -> str:
        looks, decided = executor.signals.look_aheads, _next_decision(executor)
        losses = task.losses(next(rows))
        optimizer.zero_grad()
        with watch:
            total = executor(losses)
        total.backward()
        with watch:
            executor.step(optimizer)
        task.after_step()
        if executor.signals.look_aheads > looks:
            return "look-ahead"
        return "plain" if _next_decision(executor) == decided else "decision"

    return step


class Still(torch.optim.Optimizer):
    """An optimizer that moves nothing."""

    def step(self, closure: Any = None) -> Any:
        """Nothing."""


def gates_arm(task: Classify) -> Step:
    """What the executor itself does in a step with every guard on: the losses are there, and so are the gradients."""
    parameters = [torch.zeros_like(p) for p in task.model.parameters()]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    terms = {name: torch.ones((), requires_grad=True) for name in Classify.terms}
    guards = Guards(quarantine=3, clip_norm=1e9)
    executor = LossExecutor(dict.fromkeys(terms, 1.0), base=Classify.base, guards=guards)
    optimizer = Still(parameters, {"lr": 1e-3})

    def step(watch: Watch) -> str:
        with watch:
            executor(terms)
            executor.step(optimizer)
        return "plain"

    return step


def _next_decision(executor: LossExecutor) -> int:
    return next((m.next_decision for m in executor.modulators if isinstance(m, LossMonitor)), 0)


def run_overhead(laps: Sequence[Lap], bare: Sequence[Lap], steps: int) -> float:
    """Share by which a whole run of ``steps`` is slower, from the measured kinds of step and their numbers."""
    config = LossMonitor().config
    looks = 32
    # The last one ends the monitor's episode, where only keeping is left.
    decisions = int((1 - config.quiet_end) * steps) // max(config.every, steps // config.decisions) + 1
    numbers = {"look-ahead": looks, "decision": decisions, "plain": steps - looks - decisions}
    return sum(number * extra(of_kind(laps, kind), bare) for kind, number in numbers.items()) / steps


def of_kind(laps: Sequence[Lap], kind: str) -> list[Lap]:
    """The steps of one kind; look-aheads come early and are few, so only the others leave out those that warm up."""
    return [lap for lap in laps[0 if kind == "look-ahead" else WARM_UP :] if lap.kind == kind]


def epoch_overhead(epochs: int) -> float:
    """Share by which an epoch of ``baseline`` is slower than the bare loop over the same 5,000 images."""
    config = RunConfig(dataset="cifar10", mode="baseline", epochs=2 * epochs, precision="fp32", device="cpu")
    training, bare = (prepare(config, noise(5000)) for _ in range(2))
    seconds: dict[str, list[float]] = {"baseline": [], "bare": []}
    steps = epochs * len(training.batches)
    with tempfile.TemporaryDirectory() as folder, RunLogger(folder) as log, progress(steps, "baseline") as bar:
        for epoch in range(epochs):
            for arm in ("baseline", "bare") if epoch % 2 else ("bare", "baseline"):
                start = time.perf_counter()
                if arm == "bare":
                    _bare_epoch(bare)
                else:
                    loop.train_epoch(training, log, bar)
                seconds[arm].append(time.perf_counter() - start)
    return min(seconds["baseline"]) / min(seconds["bare"]) - 1


def checkpoint_ms() -> dict[str, float]:
    """Milliseconds that a checkpoint of the full system's run takes after two epochs, and its size in MB."""
    config = RunConfig(dataset="cifar10", mode="full", epochs=25, precision="fp32", device="cpu")
    training, seconds = prepare(config, noise(5000)), []
    with tempfile.TemporaryDirectory() as folder, RunLogger(folder) as log, progress(78, "full") as bar:
        checkpoints = Checkpoints(Path(folder) / "checkpoints")
        for _ in range(2):
            loop.train_epoch(training, log, bar)
        for step in range(20):
            start = time.perf_counter()
            checkpoints.save(step, training.state_dict(log))
            seconds.append(time.perf_counter() - start)
        size = max(file.stat().st_size for file in checkpoints.folder.iterdir())
    return {"checkpoint_ms": 1000 * statistics.median(seconds), "checkpoint_mb": size / 1e6}


def _bare_epoch(training: Training) -> None:
    task, optimizer = training.task, training.learner.optimizer
    task.model.train()
    for rows in training.batches:
        losses = task.losses(rows)
        optimizer.zero_grad()
        sum(1.0 * loss for loss in losses.values()).backward()  # type: ignore[union-attr]
        optimizer.step()
        task.after_step()
        training.learner.scheduler.step()


def step_overheads(steps: int) -> dict[str, float]:
    """What each arm adds to a bare step, as a share of it; each takes turns with the bare loop alone.

    A step of one executor after those of several others would find caches colder than they ever are in a run.
    """
    task = build_task()

    def beside_bare(arm: Step) -> tuple[list[Lap], list[Lap]]:
        laps = take_turns({"bare": bare_arm(task), "arm": arm}, WARM_UP + steps)
        return laps["arm"], laps["bare"][WARM_UP:]

    again, bare = beside_bare(bare_arm(task))
    bare_ms = 1000 * statistics.median(lap.whole for lap in bare)
    found = {"bare_ms": bare_ms, **_overheads("bare again", again, bare)}
    for rule in RULES:
        found |= _overheads(rule, *beside_bare(executor_arm(task, full=False, weighting=rule)))
    gates, bare = beside_bare(gates_arm(task))
    alone = [lap.part for lap in gates[WARM_UP:]]
    found["gates_overhead"] = statistics.median(alone) / statistics.median(lap.whole for lap in bare)
    full, bare = beside_bare(executor_arm(task, full=True))
    found["full_between_overhead"] = extra(of_kind(full, "plain"), bare)
    found["look_ahead_steps"] = 1 + extra(of_kind(full, "look-ahead"), bare)
    found["decision_steps"] = 1 + extra(of_kind(full, "decision"), bare)
    return found | {f"full_{n}_overhead": run_overhead(full, bare, n) for n in (1_000, 10_000)}


def _overheads(name: str, laps: Sequence[Lap], bare: Sequence[Lap]) -> dict[str, float]:
    laps = laps[WARM_UP:]
    return {f"{name}_overhead": extra(laps, bare), f"{name}_whole_step": extra_whole(laps, bare)}


def measure(flags: Flags) -> dict[str, float]:
    """All ratios, as fractions over the bare loop."""
    torch.set_num_threads(flags.threads)
    found = step_overheads(flags.steps)
    found["baseline_epoch_overhead"] = epoch_overhead(flags.epochs)
    found |= checkpoint_ms()
    found["peak_memory_mb"] = peak_memory_mb()
    if flags.rule_steps:
        found |= {f"{name} (rule)": ratio for name, ratio in rules.measure(flags.rule_steps, BATCH).items()}
        for rule in rules.BUCKET_RULES:
            found[f"1000_buckets_{rule}_ms"] = rules.bucket_ms(rule, flags.rule_steps, BATCH)
    return found


@command
def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    flags = parse(Flags, argv, PROG, "Time the executor beside a bare loop.")
    found = measure(flags)
    if flags.json:
        print(json.dumps(found))
        return 0
    print(f"bare loop: {found['bare_ms']:.1f} ms a step, {flags.threads} thread(s), torch {torch.__version__}")
    for name, value in found.items():
        if name.endswith("_overhead"):
            whole = found.get(name.replace("_overhead", "_whole_step"))
            beside = "" if whole is None else f"   whole steps {100 * whole:+.2f}%"
            print(f"{name.removesuffix('_overhead').replace('_', ' '):<18}{100 * value:+7.2f}%{beside}")
    print(
        f"a look-ahead step takes {found['look_ahead_steps']:.2f} bare steps, a decision {found['decision_steps']:.2f}"
    )
    print(f"a checkpoint of the full system's run: {found['checkpoint_ms']:.1f} ms, {found['checkpoint_mb']:.1f} MB")
    print(f"peak memory of this process: {found['peak_memory_mb']:.0f} MB")
    if flags.rule_steps:
        print("\nsteps of the plain weighted sum that a step takes, four terms, gradients at the features:")
        for name, ratio in found.items():
            if name.endswith(" (rule)"):
                print(f"  {name.removesuffix(' (rule)'):<36}{ratio:6.3f}")
        added = ", ".join(f"{rule} {found[f'1000_buckets_{rule}_ms']:.2f}" for rule in rules.BUCKET_RULES)
        print(f"1,000 bucket terms add to a step, in ms: {added}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
