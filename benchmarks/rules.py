"""What each weighting rule costs beside the plain weighted sum: the table that ``benchmarks/overhead.py`` prints.

Small CNN, batch 128, four terms that meet in the hidden features (cross-entropy, self-distillation, supervised
contrastive, confidence), Adam. Each arm takes turns with the plain sum on one model, as :mod:`benchmarks.clock` says;
of those that walk through the model otherwise, whole steps are compared. Gradient rules take their gradients at the
features.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptive_loss import LossExecutor, bucket_means
from adaptive_loss.models.simple_cnn import SimpleCNN
from adaptive_loss.tasks.classify import MeanTeacher, confidence_penalty, supervised_contrastive
from adaptive_loss.weighting import TORCHJD, weightings
from benchmarks.clock import Lap, Step, Watch, extra, extra_whole, take_turns

TERMS = ("cross_entropy", "self_distillation", "contrastive", "confidence")
LEVELS = [0.1, 1.0, 3.0, 10.0]
GIVEN: Mapping[str, Mapping[str, object]] = {
    "noise levels": {"levels": LEVELS},
    "signal-to-noise ratios": {"levels": LEVELS},
    "shares": {"shares": LEVELS},
    "a term": {"term": "contrastive"},
    "a schedule": {"schedule": [{"step": 1, **dict.fromkeys(TERMS, 1.0)}]},
}
EXTRA: Mapping[str, Mapping[str, object]] = {"switch_on": {"at": 0}, "wind_down": {"stall": 1}}
SAME, OTHER = "through the same passes", "through other passes"
LATE = ", every 10"
WARM_UP = 3
BUCKETS = 1000
BUCKET_RULES = ("fixed", "min_snr", "inverse_ema")


class Bench:
    """One model, its terms on a fixed batch of noise, and its optimizer.

    Args:
        batch: images a step.
    """

    def __init__(self, batch: int) -> None:
        torch.manual_seed(0)
        self.model = SimpleCNN()
        self.model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.teacher = MeanTeacher(self.model)
        self.images = torch.randn(batch, 3, 32, 32).contiguous(memory_format=torch.channels_last)
        self.labels = torch.randint(10, (batch,))
        self.optimizer = torch.optim.Adam(self.model.parameters())

    def losses(self) -> tuple[dict[str, Tensor], Tensor]:
        """The four terms, and the features in which they meet."""
        features = self.model.features(self.images)
        log_p = F.log_softmax(self.model.classify(features), dim=1)
        terms = (
            F.nll_loss(log_p, self.labels),
            self.teacher.loss(self.images, log_p),
            supervised_contrastive(features, self.labels),
            confidence_penalty(log_p),
        )
        return dict(zip(TERMS, terms, strict=True)), features

    def plain(self, watch: Watch) -> str:
        """The loop as people write it."""
        losses, _ = self.losses()
        self.optimizer.zero_grad()
        with watch:
            total = sum(1.0 * loss for loss in losses.values())
        total.backward()  # type: ignore[union-attr]
        with watch:
            self.optimizer.step()
        return SAME

    def backward_by_loss(self, _watch: Watch) -> str:
        """A backward a term, as rules without a tap need it."""
        losses, _ = self.losses()
        self.optimizer.zero_grad()
        for loss in losses.values():
            loss.backward(retain_graph=True)
        self.optimizer.step()
        return OTHER

    def torchjd(self, chunk: int | None, _watch: Watch) -> str:
        """TorchJD's own way: Jacobians of all parameters behind the features, one term at a time or batched."""
        from torchjd.aggregation import UPGrad
        from torchjd.autojac import jac_to_grad, mtl_backward

        losses, features = self.losses()
        self.optimizer.zero_grad()
        mtl_backward(list(losses.values()), features, parallel_chunk_size=chunk, retain_graph=True)
        shared = [p for part in (self.model.blocks, self.model.hidden) for p in part.parameters()]
        jac_to_grad(shared, UPGrad())
        self.optimizer.step()
        return OTHER

    def rule(self, name: str, every: int = 1) -> Step:
        """A step through an executor with the rule called ``name``."""
        executor = executor_for(name, every)
        own = list(executor.parameters())
        if own:
            # One optimizer for all: where its state lies in memory moves a step by as much as a rule costs.
            self.optimizer.add_param_group({"params": own})

        def step(watch: Watch) -> str:
            losses, features = self.losses()
            self.optimizer.zero_grad()
            with watch:
                total = executor(losses, tap=features)
            total.backward()
            with watch:
                executor.step(self.optimizer)
            return SAME

        return step


def executor_for(name: str, every: int = 1) -> LossExecutor:
    """An executor of the four terms whose rule is given what it needs."""
    kind = weightings.get(name)
    needs = kind(len(TERMS)).needs
    options = {key: value for need in needs for key, value in GIVEN.get(need, {}).items()} | dict(EXTRA.get(name, {}))
    if every > 1:
        options["every"] = every
    return LossExecutor(
        dict.fromkeys(TERMS, 1.0),
        base="cross_entropy",
        targets={"contrastive": 4.0} if "targets" in needs else None,
        weighting=kind(len(TERMS), **options),
        total_steps=1000,
    )


def arms(bench: Bench) -> dict[str, Step]:
    """Name → one training step."""
    found: dict[str, Step] = {"a backward a loss": bench.backward_by_loss}
    names = list(weightings.names())
    if _has_torchjd():
        found["TorchJD mtl_backward, sequential"] = functools.partial(bench.torchjd, 1)
        found["TorchJD mtl_backward, batched"] = functools.partial(bench.torchjd, None)
        names += TORCHJD
    found |= {name: bench.rule(name) for name in names}
    late = [name for name in names if "gradients" in weightings.get(name)(len(TERMS)).needs]
    return found | {f"{name}{LATE}": bench.rule(name, every=10) for name in late}


def _has_torchjd() -> bool:
    try:
        import torchjd  # noqa: F401
    except ImportError:
        return False
    return True


def measure(steps: int, batch: int) -> dict[str, float]:
    """Each arm's step, as a multiple of the plain sum's (the mean of ten where only every tenth looks).

    An arm takes turns with the plain sum alone: after fifty others it would find colder caches than a run has.
    """
    bench, found = Bench(batch), {}
    for name, arm in arms(bench).items():
        laps = take_turns({"plain sum": bench.plain, name: arm}, WARM_UP + steps)
        found[name] = 1 + _more(name, laps[name][WARM_UP:], laps["plain sum"][WARM_UP:])
    return found


def _more(name: str, laps: Sequence[Lap], plain: Sequence[Lap]) -> float:
    if laps[0].kind == OTHER:
        return extra_whole(laps, plain)
    if not name.endswith(LATE):
        return extra(laps, plain)
    # The rule looks at its first step and at every tenth after it.
    looks = [lap for i, lap in enumerate(laps, WARM_UP) if i % 10 == 0]
    rest = [lap for i, lap in enumerate(laps, WARM_UP) if i % 10]
    return (9 * extra(rest, plain) + extra(looks, plain)) / 10


def bucket_ms(rule: str, steps: int, batch: int) -> float:
    """Milliseconds that 1,000 bucket terms under a rule add to a step of one weight, over the mean of those losses."""
    weight = nn.Parameter(torch.ones(batch))
    optimizer = torch.optim.SGD([weight], lr=1e-3)
    levels = {"levels": torch.logspace(-2, 2, BUCKETS)} if rule == "min_snr" else {}
    weights = {f"bucket {k}": 1 / BUCKETS for k in range(BUCKETS)}
    executor = LossExecutor(weights, weighting=weightings.get(rule)(BUCKETS, **levels))
    seconds: dict[str, list[float]] = {"bare": [], "buckets": []}
    for _ in range(10 + 10 * steps):
        losses, index = torch.rand(batch), torch.randint(BUCKETS, (batch,))
        start = time.perf_counter()
        optimizer.zero_grad()
        (weight * losses).mean().backward()
        optimizer.step()
        middle = time.perf_counter()
        optimizer.zero_grad()
        executor(bucket_means(weight * losses, index, BUCKETS)).backward()
        executor.step(optimizer)
        seconds["bare"].append(middle - start)
        seconds["buckets"].append(time.perf_counter() - middle)
    return 1000 * (statistics.median(seconds["buckets"][10:]) - statistics.median(seconds["bare"][10:]))
