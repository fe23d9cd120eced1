"""held_out and sample_quality: what they draw, what they leave alone, what they refuse."""

import math

import pytest
import torch
from torch import nn

from adaptive_loss import LossExecutor
from adaptive_loss.meta_controller import RULE, MetaController
from adaptive_loss.metrics.kid import kernel_distance
from adaptive_loss.probes import held_out, sample_quality

DATA = torch.arange(10.0)


def drawn(probe: held_out) -> list[float]:
    return probe().tolist()


def identity(x: torch.Tensor) -> torch.Tensor:
    return x


def test_batches_are_drawn_without_replacement_from_its_own_generator():
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    first, second = held_out(identity, DATA, batch_size=4), held_out(identity, DATA, batch_size=4)
    batches = [drawn(first) for _ in range(5)]
    assert batches == [drawn(second) for _ in range(5)]
    assert all(len(set(batch)) == 4 for batch in batches) and len(set(map(tuple, batches))) > 1
    assert drawn(held_out(identity, DATA, batch_size=4, seed=1)) != batches[0]
    assert torch.equal(before, torch.random.get_rng_state())


def test_small_data_are_used_whole():
    assert sorted(drawn(held_out(identity, DATA, batch_size=64))) == DATA.tolist()


def test_rows_stay_together():
    x, y = held_out(lambda x, y: (x, y), (DATA, 2 * DATA), batch_size=5)()
    assert torch.equal(2 * x, y)


def test_state_continues():
    probe = held_out(identity, DATA, batch_size=3)
    drawn(probe)
    state = probe.state_dict()
    expected = [drawn(probe) for _ in range(3)]
    other = held_out(identity, DATA, batch_size=3, seed=7)
    other.load_state_dict(state)
    assert [drawn(other) for _ in range(3)] == expected


def test_the_model_is_in_eval_mode_meanwhile_and_as_before_afterwards():
    model = nn.Sequential(nn.BatchNorm1d(1), nn.Dropout(0.9), nn.Linear(1, 1))
    model[1].eval()
    seen = []

    def loss(x: torch.Tensor) -> torch.Tensor:
        seen.append([module.training for module in model.modules()])
        return model(x[:, None]).mean()

    statistics = model[0].running_mean.clone()
    value = held_out(loss, DATA, model=model)()
    assert value.requires_grad and not any(seen[0])
    assert [module.training for module in model.modules()] == [True, True, False, True]
    assert torch.equal(statistics, model[0].running_mean)

    def fail(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        held_out(fail, DATA, model=model)()
    assert model.training and not model[1].training


@pytest.mark.parametrize("data", [torch.zeros(0), (torch.zeros(3), torch.zeros(4)), ()])
def test_bad_data(data):
    with pytest.raises(ValueError, match="lengths"):
        held_out(identity, data)


@pytest.mark.parametrize("size", [0, -1])
def test_bad_batch_size(size):
    with pytest.raises(ValueError, match="batch_size"):
        held_out(identity, DATA, batch_size=size)


# ---- sample_quality


def noise(count: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(count, 2, generator=generator)


REAL = torch.randn(60, 2, generator=torch.Generator().manual_seed(5))


def test_sample_quality_is_the_mean_kernel_distance_of_its_batches():
    probe = sample_quality(noise, REAL, lambda x: 2 * x, batch_size=8, batches=3, seed=4)
    generator, distances = torch.Generator().manual_seed(4), []
    for _ in range(3):
        rows = torch.randperm(60, generator=generator)[:8]
        distances.append(kernel_distance(2 * noise(8, generator), 2 * REAL[rows]))
    assert float(probe()) == float(torch.stack(distances).mean())


def test_sample_quality_draws_from_its_own_generator_and_continues_from_its_state():
    before = torch.random.get_rng_state()
    one, other = (sample_quality(noise, REAL, identity, batch_size=8, seed=seed) for seed in (0, 9))
    first = float(one())
    state = one.state_dict()
    expected = [float(one()) for _ in range(3)]
    assert first not in expected and float(other()) != first
    other.load_state_dict(state)
    assert [float(other()) for _ in range(3)] == expected
    assert torch.equal(before, torch.random.get_rng_state())


def test_sample_quality_of_a_perfect_generator_is_0_on_average_and_of_a_worse_one_above():
    data = noise(2000, torch.Generator().manual_seed(1))

    def mean(shift: float) -> float:
        probe = sample_quality(lambda n, rng: noise(n, rng) + shift, data, identity, batch_size=32, batches=200)
        return float(probe())

    assert abs(mean(0.0)) < 0.1 < mean(0.5) < mean(1.0)


def test_descent_on_sample_quality_moves_a_generator_to_the_data():
    shift = torch.zeros(2, requires_grad=True)
    probe = sample_quality(lambda n, rng: noise(n, rng) + shift, REAL + 1.0, identity, batch_size=32)
    optimizer = torch.optim.Adam([shift], lr=0.05)
    for _ in range(100):
        optimizer.zero_grad()
        probe().backward()
        optimizer.step()
    torch.testing.assert_close(shift.detach(), (REAL + 1.0).mean(0), atol=0.35, rtol=0)


def test_the_model_is_in_eval_mode_while_it_generates():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    seen = []

    def generate(count: int, generator: torch.Generator) -> torch.Tensor:
        seen.append(model.training)
        return model(noise(count, generator))

    assert sample_quality(generate, REAL, identity, model=model, batches=2)().requires_grad
    assert seen == [False, False] and model.training


def test_only_with_reconstructions_does_an_encoder_feel_sample_quality():
    encoder, decoder = nn.Linear(2, 2), nn.Linear(2, 2)

    def generate(count: int, generator: torch.Generator) -> torch.Tensor:
        return decoder(noise(count, generator))

    def reconstruct(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return decoder(encoder(x) + 0.1 * torch.randn(x.shape, generator=generator))

    sample_quality(generate, REAL, identity)().backward()
    assert encoder.weight.grad is None and decoder.weight.grad is not None
    sample_quality(generate, REAL, identity, reconstruct=reconstruct)().backward()
    assert encoder.weight.grad is not None and encoder.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(("given", "part"), [({}, 1.0), ({"fidelity": 0.5}, 0.5)])
def test_with_reconstructions_it_is_the_sum_of_two_legs(given, part):
    def blur(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return x / 2 + torch.randn(x.shape, generator=generator)

    probe = sample_quality(noise, REAL, identity, reconstruct=blur, batch_size=8, batches=1, seed=4, **given)
    generator = torch.Generator().manual_seed(4)
    rows, samples = torch.randperm(60, generator=generator)[:8], noise(8, generator)
    between = blur(REAL[rows], generator)
    others = torch.randperm(60, generator=generator)[:8]
    first, second = kernel_distance(samples, between), kernel_distance(between, REAL[others])
    assert float(probe()) == float(first + part * second)


def test_it_is_a_probe_of_the_executor():
    model = nn.Linear(2, 2)
    probe = sample_quality(lambda n, rng: model(noise(n, rng)), REAL, identity, batch_size=16)
    modulators = (MetaController(RULE),)
    executor = LossExecutor({"a": 1.0, "b": 1.0}, base="a", modulators=modulators, probe=probe, total_steps=20)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(20):
        out = model(REAL)
        optimizer.zero_grad()
        executor({"a": (out - REAL).square().mean(), "b": out.square().mean()}).backward()
        executor.step(optimizer)
    assert executor.weights["b"] != 1.0 and executor.signals.look_aheads > 0
    saved = executor.get_extra_state()["probe"]
    assert torch.equal(saved["generator"], probe.state_dict()["generator"])


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"batch_size": 1}, "not 1"),
        ({"batches": 0}, "batches is 0"),
        ({"fidelity": 0.0}, "fidelity is 0.0"),
        ({"fidelity": math.inf}, "fidelity is inf"),
    ],
)
def test_sample_quality_refuses_too_little(changes, part):
    with pytest.raises(ValueError, match=part):
        sample_quality(noise, REAL, identity, **changes)
    with pytest.raises(ValueError, match="needs 2 held-out examples"):
        sample_quality(noise, REAL[:1], identity)
