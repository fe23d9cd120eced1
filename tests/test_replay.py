"""n-step replay: returns, episode boundaries, the ring, determinism, and state."""

import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptive_loss.rl.replay import Replay

ALLOWED = torch.ones(2, dtype=torch.bool)


def make(capacity: int = 100, n_step: int = 3, gamma: float = 0.5, seed: int = 0) -> Replay:
    return Replay(capacity, 1, 2, torch.Generator().manual_seed(seed), n_step=n_step, gamma=gamma)


def feed(replay: Replay, first: int, rewards: list[float], terminated: bool = False, truncated: bool = False) -> None:
    """One episode through states first, first + 1, …; the flags belong to its last step."""
    for index, reward in enumerate(rewards):
        last = index == len(rewards) - 1
        here, there = torch.tensor([float(first + index)]), torch.tensor([float(first + index + 1)])
        replay.add(here, index % 2, reward, there, ALLOWED, terminated and last, truncated and last)


def test_n_step_returns_equal_those_computed_by_hand():
    replay = make()
    feed(replay, 0, [1.0, 2.0, 4.0, 8.0])
    stored = replay.oldest(10)
    # 1 + 2/2 + 4/4 and 2 + 4/2 + 8/4; the two younger steps still wait for their rewards.
    assert stored.ret.tolist() == [3.0, 6.0]
    assert stored.discount.tolist() == [0.125, 0.125]
    assert stored.obs.flatten().tolist() == [0.0, 1.0]
    assert stored.next_obs.flatten().tolist() == [3.0, 4.0]
    assert stored.action.tolist() == [0, 1]
    assert not stored.terminal.any()


@pytest.mark.parametrize(
    ("terminated", "truncated", "terminal"), [(True, False, True), (False, True, False), (True, True, True)]
)
def test_an_ending_flushes_the_shorter_transitions(terminated: bool, truncated: bool, terminal: bool):
    replay = make()
    feed(replay, 0, [1.0, 2.0, 4.0, 8.0], terminated=terminated, truncated=truncated)
    stored = replay.oldest(10)
    assert stored.ret.tolist() == [3.0, 6.0, 8.0, 8.0]  # …, 4 + 8/2, 8
    assert stored.discount.tolist() == [0.125, 0.125, 0.25, 0.5]
    assert stored.next_obs.flatten().tolist() == [3.0, 4.0, 4.0, 4.0]
    assert stored.terminal.tolist() == [False, terminal, terminal, terminal]


@settings(max_examples=50, deadline=None)
@given(
    episodes=st.lists(st.tuples(st.integers(1, 6), st.booleans()), min_size=1, max_size=6),
    n_step=st.integers(1, 5),
)
def test_no_transition_crosses_an_episode(episodes: list[tuple[int, bool]], n_step: int):
    replay = make(n_step=n_step, gamma=1.0)
    # Episode e lives in states 100 e … and pays 10^e per step, so that a reward or state of another would show.
    for number, (length, terminated) in enumerate(episodes):
        feed(replay, 100 * number, [10.0**number] * length, terminated=terminated, truncated=not terminated)
    stored = replay.oldest(len(replay))
    assert len(replay) == sum(length for length, _ in episodes)
    rows = zip(stored.obs, stored.next_obs, stored.ret, stored.terminal, strict=True)
    for obs, next_obs, ret, terminal in rows:
        number, place = divmod(int(obs), 100)
        length, terminated = episodes[number]
        steps = min(n_step, length - place)
        assert int(next_obs) == int(obs) + steps
        assert float(ret) == steps * 10.0**number
        assert bool(terminal) == (terminated and place + steps == length)


def test_the_ring_overwrites_the_oldest():
    replay = make(capacity=4, n_step=1)
    feed(replay, 0, [float(reward) for reward in range(6)], truncated=True)
    assert len(replay) == 4
    assert replay.oldest(4).ret.tolist() == [2.0, 3.0, 4.0, 5.0]
    assert replay.oldest(2).ret.tolist() == [2.0, 3.0]
    assert set(replay.sample(200).ret.tolist()) == {2.0, 3.0, 4.0, 5.0}


def test_the_replay_keeps_its_own_copy_of_an_observation():
    replay = make(n_step=2)
    here = torch.tensor([1.0])
    replay.add(here, 0, 0.0, here, ALLOWED, False, False)
    here.fill_(9.0)
    replay.add(here, 0, 0.0, here, ALLOWED, True, False)
    assert replay.oldest(1).obs.item() == 1.0


def test_draws_depend_on_the_own_generator_only():
    def draws(seed: int) -> list[float]:
        replay = make(n_step=1, seed=seed)
        feed(replay, 0, [float(reward) for reward in range(50)])
        return replay.sample(20).ret.tolist()

    before = torch.get_rng_state()
    torch.manual_seed(1)
    one = draws(0)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert draws(0) == one
    assert draws(1) != one
    assert torch.equal(torch.get_rng_state(), state)
    torch.set_rng_state(before)


@pytest.mark.parametrize("steps", [0, 1, 5, 7, 23])
def test_state_continues_bit_for_bit_with_the_pending_tail(steps: int):
    replay, other = make(capacity=8), make(capacity=8, seed=99)
    feed(replay, 0, [0.1 * reward for reward in range(steps)])
    feed(other, 50, [1.0] * 5)
    file = io.BytesIO()
    torch.save(replay.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    for each in (replay, other):
        feed(each, 100, [1.0, 2.0, 3.0], terminated=True)
    assert len(other) == len(replay)
    for mine, theirs in zip(replay.oldest(8), other.oldest(8), strict=True):
        assert torch.equal(mine, theirs)
    for mine, theirs in zip(replay.sample(16), other.sample(16), strict=True):
        assert torch.equal(mine, theirs)


def test_a_snapshot_is_apart_from_later_writes():
    replay = make(capacity=2, n_step=1)
    feed(replay, 0, [1.0, 2.0])
    state = replay.state_dict()
    feed(replay, 0, [3.0, 4.0])
    assert state["columns"]["ret"].tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    "other",
    [
        Replay(4, 1, 2, torch.Generator()),
        Replay(50, 1, 2, torch.Generator()),
        Replay(8, 3, 2, torch.Generator()),
        Replay(8, 1, 5, torch.Generator()),
    ],
    ids=["smaller", "larger", "observation", "actions"],
)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(other: Replay):
    replay = make(capacity=8, n_step=1)
    feed(replay, 0, [1.0] * 9)
    with pytest.raises(ValueError, match="another capacity"):
        other.load_state_dict(replay.state_dict())
    assert len(other) == 0


@pytest.mark.parametrize(
    "arguments", [(0, 1, 2), (1, 0, 2), (1, 1, 0)], ids=["capacity", "observation_size", "n_actions"]
)
def test_sizes_below_one_are_refused(arguments: tuple[int, int, int]):
    with pytest.raises(ValueError, match="at least 1"):
        Replay(*arguments, torch.Generator())


def test_other_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="at least 1"):
        make(n_step=0)
    with pytest.raises(ValueError, match="gamma"):
        make(gamma=1.5)
    with pytest.raises(ValueError, match="empty replay"):
        make().sample(1)


def test_default_device_and_dtype_do_not_move_the_buffer():
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            replay = make(n_step=1)
            batch_source = replay.oldest(1)
    finally:
        torch.set_default_dtype(torch.float32)
    assert batch_source.obs.device.type == "cpu"
    assert batch_source.obs.dtype == torch.float32
