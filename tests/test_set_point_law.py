"""The law that holds a term at its target: in any unit, whatever Adam remembers, and bit for bit after a cut."""

from __future__ import annotations

import math

import pytest
import torch

from adaptive_loss import Guards, LossExecutor

QUIET = Guards(spikes=False, share_cap=None)
WANTED = torch.tensor([3.0, -2.0, 1.0])


def hold(unit: float, steps: int = 1000) -> tuple[float, LossExecutor]:
    """A noisy fit held at 1 beside a pull to 0, its loss in another unit; what it comes to, and by which weights."""
    p = torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.Adam([p], lr=0.1)
    executor = LossExecutor({"fit": 1.0, "pull": 1.0}, base="pull", targets={"fit": unit}, guards=QUIET)
    for _ in range(steps):
        optimizer.zero_grad()
        executor({"fit": unit * fit(p), "pull": p.square().sum() / 2}).backward()
        executor.step(optimizer)
    return float(fit(p.detach())), executor


def fit(p: torch.Tensor) -> torch.Tensor:
    """½(‖p − c‖² + 1): noise keeps it at ½ and more."""
    return ((p - WANTED).square().sum() + 1) / 2


@pytest.mark.parametrize("unit", [1.0, 1 / 64, 10_000.0])
def test_a_target_is_held_in_every_unit(unit: float) -> None:
    reached, executor = hold(unit)
    assert reached == pytest.approx(1.0, abs=0.02)
    # It is 1 where ‖p − c‖ = 1, on the way from c to 0, where w·unit·(c − p) = p: w·unit = ‖c‖ − 1.
    assert executor.weights["fit"] * unit == pytest.approx(math.sqrt(14) - 1, rel=0.1)


def test_noise_on_a_loss_that_is_mostly_offset_does_not_move_its_weight_away() -> None:
    p, dice = torch.zeros(3, requires_grad=True), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam([p], lr=0.1)
    executor = LossExecutor({"fit": 1.0, "pull": 1.0}, base="pull", targets={"fit": 1001.0}, guards=QUIET)
    seen = []
    for _ in range(900):
        optimizer.zero_grad()
        noise = 10 * torch.randn((), generator=dice)
        executor({"fit": fit(p) + 1000 + noise, "pull": p.square().sum() / 2}).backward()
        executor.step(optimizer)
        seen.append(math.log(executor.weights["fit"]))
    steady = sum(seen[450:]) / 450
    assert not executor.modulators[0].hurried.any() and abs(steady) < 0.2  # 1% of noise hides the fit


def test_shadow_mode_tells_the_optimizer_nothing() -> None:
    def state(apply: bool) -> torch.Tensor:
        p = torch.zeros(3, requires_grad=True)
        optimizer = torch.optim.Adam([p], lr=0.0)
        executor = LossExecutor(
            {"fit": 1.0, "pull": 1.0}, base="pull", targets={"fit": 1e-3}, guards=QUIET, apply=apply
        )
        for _ in range(40):
            optimizer.zero_grad()
            executor({"fit": fit(p), "pull": p.square().sum() / 2}).backward()
            executor.step(optimizer)
        return optimizer.state[p]["exp_avg_sq"] / (1 - 0.999**40)

    torch.testing.assert_close(state(apply=False).sqrt(), WANTED.abs(), rtol=1e-4, atol=0)
    assert (state(apply=True).sqrt() > 2 * WANTED.abs()).all()


def fall(losses: dict[str, float]) -> float:
    """How far a target of 1 takes the log-weight of ``kl`` in five steps of these losses."""
    p = torch.ones(1, requires_grad=True)
    optimizer = torch.optim.SGD([p], lr=0.0)
    executor = LossExecutor({"fit": 1.0, "kl": 1.0}, base="fit", targets={"kl": 1.0}, guards=QUIET)
    for _ in range(5):
        executor({name: p.sum() * value for name, value in losses.items()}).backward()
        executor.step(optimizer)
    return math.log(executor.weights["kl"])


def test_a_term_hurries_only_below_its_target_and_where_it_hides_the_rest() -> None:
    assert fall({"fit": 1e-3, "kl": 0.5}) == pytest.approx(-0.1 * 4)  # a weight moves after its step
    assert fall({"fit": 1.0, "kl": 0.5}) == pytest.approx(0.05 * math.log(0.5) * 4)
    assert fall({"fit": 1e-3, "kl": 2.0}) == pytest.approx(0.05 * math.log(2.0) * 4)
    assert fall({"fit": 1e-3, "kl": 0.95}) == pytest.approx(0.05 * math.log(0.95) * 4)


def test_the_memory_of_the_optimizer_follows_the_weight() -> None:
    p = torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.Adam([p], lr=0.0)  # so that the gradient itself stays
    executor = LossExecutor({"fit": 1.0, "pull": 1.0}, base="pull", targets={"fit": 10.0}, guards=QUIET)
    for _ in range(60):
        optimizer.zero_grad()
        executor({"fit": fit(p), "pull": 1e-4 + 0 * p.sum()}).backward()
        executor.step(optimizer)
    weight = executor.weights["fit"]
    squares = optimizer.state[p]["exp_avg_sq"] / (1 - 0.999**60)
    assert weight < 0.2
    torch.testing.assert_close(squares.sqrt(), weight * WANTED.abs(), rtol=0.35, atol=0)


def test_a_held_term_goes_on_bit_for_bit() -> None:
    def run(cut: bool) -> torch.Tensor:
        p = torch.full((3,), 0.1, requires_grad=True)
        optimizer = torch.optim.Adam([p], lr=0.02)
        executor = made()
        for step in range(40):
            if cut and step == 23:
                state = executor.state_dict()
                executor = made()
                executor.load_state_dict(state)
            optimizer.zero_grad()
            executor({"fit": 100 * fit(p), "pull": p.square().sum() / 2}).backward()
            executor.step(optimizer)
        return p.detach()

    def made() -> LossExecutor:
        return LossExecutor({"fit": 1.0, "pull": 1.0}, base="pull", targets={"fit": 20.0}, guards=QUIET)

    assert torch.equal(run(cut=False), run(cut=True))
