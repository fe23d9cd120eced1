"""Look-aheads where something degenerates: terms that cancel, and runs longer than announced."""

from __future__ import annotations

import pytest
import torch

from adaptive_loss.gradients import gramian, look_ahead
from adaptive_loss.lookahead import Schedule


@pytest.mark.parametrize("seed", range(5))
def test_terms_that_cancel_give_bounded_gains(seed: int) -> None:
    # v₀ = −v₁ up to rounding: G is noise, and a projection on noise must not blow up.
    generator = torch.Generator().manual_seed(seed)
    for _ in range(200):
        v, p = torch.randn(30, generator=generator), torch.randn(30, generator=generator)
        products = gramian([[0.1 * v], [-(0.3 * v) / 3], [p]], [1.0])
        noise = torch.randn(3, 3, generator=generator, dtype=torch.float64)
        products = products * (1 + 1e-8 * (noise + noise.T))
        assert float(look_ahead(products, torch.ones(2, dtype=torch.float64), None, 0.0).gain.abs().max()) < 2.5


@pytest.mark.parametrize("total", [1, 10, 26, 100])
def test_a_run_longer_than_announced_does_not_look_at_every_step(total: int) -> None:
    schedule = Schedule()
    assert sum(schedule.due(step, total) for step in range(total)) <= 32
    assert sum(schedule.due(step, total) for step in range(total, 1000)) < 50
