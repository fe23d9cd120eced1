"""What one decision of the monitor and one move of the controller cost, in milliseconds, beyond the signals.

Five terms, a monitor of five trained networks (their values do not matter here), a controller with all twelve
look-aheads in its memory. A bare product of two small matrices is measured in between, to tell a busy machine from a
slow decision. Run from a checkout, seconds on one core:

    python -m benchmarks.decisions
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch

from adaptive_loss.gradients import look_ahead
from adaptive_loss.loss_monitor import LossMonitor
from adaptive_loss.losses import Terms
from adaptive_loss.meta.rollouts import greedy_agent
from adaptive_loss.meta_controller import CLIMB, MetaController
from adaptive_loss.signals import Signals
from adaptive_loss.weighting.base import Context

TERMS, STEPS, LOOKS = 5, 1000, 14


def context() -> Context:
    """A run in its middle, with a full memory."""
    terms = Terms({f"term_{i}": 1.0 for i in range(TERMS)}, "term_0")
    signals, dice = Signals(TERMS, STEPS), torch.Generator().manual_seed(0)
    for i in range(STEPS // 2):
        values = torch.rand(TERMS, generator=dice, dtype=torch.float64) + 0.5
        signals.update(values, gradient_norm=1.0, learning_rate=1e-3)
        if i >= STEPS // 2 - LOOKS:
            vectors = torch.randn(TERMS + 1, 50, generator=dice, dtype=torch.float64)
            signals.look(look_ahead(vectors @ vectors.mT, terms.start_weights, 0, 1.0), 1.0)
    start = terms.start_weights
    return Context(signals.step, terms.active, signals, start, start, looked=True, objective=lambda: 1.0)


def milliseconds(call: Callable[[], object], repeats: int) -> float:
    """Median of so many calls."""
    found = []
    for _ in range(repeats):
        begun = time.perf_counter()
        call()
        found.append(1e3 * (time.perf_counter() - begun))
    return statistics.median(found)


def measure(repeats: int) -> dict[str, float]:
    """What is measured → milliseconds."""
    seen = context()
    terms = Terms({f"term_{i}": 1.0 for i in range(TERMS)}, "term_0")
    monitor, controller = LossMonitor(network=greedy_agent({}).online.state_dict()), MetaController(CLIMB)
    for one in (monitor, controller):
        one.bind(terms, STEPS, 0)
    matrix = torch.ones(8, 8)

    def decide() -> None:
        monitor.next_decision = 0
        monitor.after_step(seen)

    return {
        "a bare product": milliseconds(lambda: matrix @ matrix, repeats),
        "monitor, a decision": milliseconds(decide, repeats),
        "controller, a move": milliseconds(lambda: controller.after_step(seen), repeats),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Milliseconds a decision of the monitor and a move of the controller.")
    parser.add_argument("--repeats", type=int, default=1000, help="calls, of which the median counts")
    torch.set_num_threads(1)
    for name, value in measure(parser.parse_args(argv).repeats).items():
        print(f"{name:<22}{value:.4f} ms")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
