"""Value networks: symmetry, size independence, near-zero start, dueling, priors, stacking."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from adaptive_loss.rl.networks import (
    MLPQ,
    EquivariantQ,
    StackedLinear,
    dueling_values,
    equivariant_values,
    in_numpy,
    stack,
)

G, F = 4, 3


def lively(network: nn.Module, seed: int = 0) -> nn.Module:
    """Move every weight away from the near-zero start, where many properties hold trivially."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return network


def permuted(observation: Tensor, order: list[int], n_global: int = G) -> Tensor:
    blocks = observation[:, n_global:].unflatten(1, (len(order), F))[:, order]
    return torch.cat([observation[:, :n_global], blocks.flatten(1)], dim=1)


@settings(max_examples=30, deadline=None)
@given(order=st.integers(1, 6).flatmap(lambda k: st.permutations(range(k))), dueling=st.booleans())
def test_permuting_the_terms_permutes_the_actions(order: list[int], dueling: bool):
    network = lively(EquivariantQ(G, F, hidden=16, dueling=dueling))
    observation = torch.randn(5, G + len(order) * F, generator=torch.Generator().manual_seed(1))
    values, moved = network(observation), network(permuted(observation, order))
    actions = [0, 1] + [2 + 2 * term + way for term in order for way in (0, 1)]
    torch.testing.assert_close(moved, values[:, actions], atol=1e-6, rtol=1e-5)


def test_the_parameters_do_not_depend_on_the_number_of_terms():
    network = lively(EquivariantQ(G, F))
    for terms in (1, 3, 5):
        assert network(torch.randn(2, G + terms * F)).shape == (2, 2 + 2 * terms)


def test_a_term_written_twice_has_the_values_of_one():
    # The pooled mean, hence every value, is the same for one term as for two equal ones.
    network = lively(EquivariantQ(G, F))
    one = torch.randn(3, G + F)
    two = torch.cat([one, one[:, G:]], dim=1)
    values = network(one)
    torch.testing.assert_close(network(two), values[:, [0, 1, 2, 3, 2, 3]], atol=1e-6, rtol=1e-5)


def test_values_of_a_term_depend_on_its_features_and_on_the_globals():
    network = lively(EquivariantQ(G, F))
    observation = torch.randn(1, G + 2 * F)
    values = network(observation)
    for place in (0, G, G + F):
        changed = observation.clone()
        changed[0, place] += 1.0
        assert (network(changed) != values).all()


def test_without_globals_the_network_still_works():
    assert lively(EquivariantQ(0, F))(torch.randn(2, 2 * F)).shape == (2, 6)


@pytest.mark.parametrize("size", [0, G, G + 1, G + F + 1])
def test_an_observation_of_the_wrong_length_is_refused(size: int):
    with pytest.raises(ValueError, match=f"got {size}"):
        EquivariantQ(G, F)(torch.zeros(1, size))


@pytest.mark.parametrize("dueling", [False, True])
@pytest.mark.parametrize("kind", ["equivariant", "mlp"])
def test_values_start_near_zero_yet_differ_between_members(kind: str, dueling: bool):
    def make() -> nn.Module:
        return EquivariantQ(G, F, dueling=dueling) if kind == "equivariant" else MLPQ(G + 2 * F, 6, dueling=dueling)

    observation = torch.randn(50, G + 2 * F)
    one, other = make()(observation), make()(observation)
    assert one.abs().max() < 0.5
    assert not torch.equal(one, other)


def test_dueling_values_have_the_state_value_as_their_mean():
    value, advantage = torch.tensor([[2.0], [-1.0]]), torch.tensor([[1.0, 3.0, 5.0], [0.0, 0.0, 9.0]])
    values = dueling_values(value, advantage)
    assert values.tolist() == [[0.0, 2.0, 4.0], [-4.0, -4.0, 5.0]]
    torch.testing.assert_close(values.mean(dim=1, keepdim=True), value)


def test_the_prior_is_added_and_not_trained():
    rule = nn.Linear(G + F, 4)
    network = EquivariantQ(G, F, prior=rule)
    observation = torch.randn(3, G + F)
    with_prior = network(observation)
    without = EquivariantQ(G, F)
    without.load_state_dict(network.state_dict())  # the prior is no part of the state
    torch.testing.assert_close(with_prior, without(observation) + rule(observation))
    with_prior.sum().backward()
    assert rule.weight.grad is None
    assert all(parameter is not rule.weight for parameter in network.parameters())


@pytest.mark.parametrize(
    "make",
    [
        lambda: EquivariantQ(G, F),
        lambda: EquivariantQ(G, F, dueling=True, prior=lambda rows: rows[:, :6] * 0.1),
        lambda: MLPQ(G + 2 * F, 6, dueling=True),
        lambda: nn.Sequential(nn.Linear(G + 2 * F, 8, bias=False), nn.Tanh(), nn.Linear(8, 6)),
        lambda: nn.Linear(G + 2 * F, 6),
    ],
    ids=["equivariant", "dueling and prior", "mlp", "sequential", "linear"],
)
def test_stacked_networks_equal_the_networks_one_by_one(make: Callable[[], nn.Module]):
    members = [lively(make(), seed) for seed in range(3)]
    inputs = torch.randn(3, 7, G + 2 * F)
    alone = torch.stack([member(rows) for member, rows in zip(members, inputs, strict=True)])
    together = stack(members)
    torch.testing.assert_close(together(inputs), alone, atol=1e-6, rtol=1e-5)
    one = sum(parameter.numel() for parameter in members[0].parameters())
    assert sum(parameter.numel() for parameter in together.parameters()) == 3 * one


@settings(max_examples=30, deadline=None)
@given(members=st.integers(1, 5), terms=st.integers(1, 9), seed=st.integers(0, 1000))
def test_in_numpy_a_stack_says_what_it_says_in_pytorch(members: int, terms: int, seed: int):
    together = stack([lively(EquivariantQ(G, F), seed + member) for member in range(members)])
    observation = torch.randn(G + terms * F, generator=torch.Generator().manual_seed(seed))
    values = equivariant_values(in_numpy(together), observation.numpy())
    with torch.no_grad():
        wanted = together(observation.expand(members, 1, -1)).squeeze(1)
    torch.testing.assert_close(torch.from_numpy(values), wanted, atol=1e-6, rtol=1e-6)


def test_stacking_copies_the_parameters():
    layers = [nn.Linear(2, 2), nn.Linear(2, 2)]
    stacked = StackedLinear(layers)
    before = stacked.weight.detach().clone()
    nn.init.zeros_(layers[0].weight)
    assert torch.equal(stacked.weight, before)


def test_stacking_refuses_parameters_it_cannot_stack():
    with pytest.raises(ValueError, match="LayerNorm holds 'weight'"):
        stack([nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))])
