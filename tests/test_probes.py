"""held_out: what it draws, what it leaves alone, what it refuses."""

import pytest
import torch
from torch import nn

from adaptive_loss.probes import held_out

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
