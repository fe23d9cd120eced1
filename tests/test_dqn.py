"""The Deep Q-network: choices, targets, determinism, state, and problems whose answer is known."""

import copy
import importlib.util
import io
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from adaptive_loss.rl.dqn import DQN, DQNConfig
from adaptive_loss.rl.networks import MLPQ, EquivariantQ
from adaptive_loss.rl.replay import Batch
from adaptive_loss.rl.targets import conservative_penalty, lower_bounds, td_target

SIZE, ACTIONS = 3, 4
ALL = torch.ones(ACTIONS, dtype=torch.bool)


class Constant(nn.Module):
    """A network whose values are the same everywhere: a bias set from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(SIZE, ACTIONS)
        nn.init.zeros_(self.out.weight)

    def forward(self, observation: Tensor) -> Tensor:
        return self.out(observation)


def make(seed: int = 0, default_action: int | None = None, **settings: Any) -> DQN:
    config = DQNConfig(**{"learning_starts": 4, "batch_size": 8, **settings})
    return DQN(lambda: MLPQ(SIZE, ACTIONS, hidden=8), SIZE, ACTIONS, config, seed=seed, default_action=default_action)


def with_values(values: list[list[float]], default_action: int | None = None, k: float = 1.0) -> DQN:
    """An agent whose members hold these constant values."""
    config = DQNConfig(ensemble=len(values), lower_bound=k)
    agent = DQN(Constant, SIZE, ACTIONS, config, seed=0, default_action=default_action)
    with torch.no_grad():
        agent.online.get_parameter("out.bias").copy_(torch.tensor(values).unsqueeze(1))
    return agent


def play(agent: DQN, steps: int, seed: int = 0) -> list[float | int | None]:
    """A made-up episode that mixes acting, storing and learning; returns all that came out."""
    generator = torch.Generator().manual_seed(seed)
    trace: list[float | int | None] = []
    obs = torch.randn(SIZE, generator=generator)
    for index in range(steps):
        action = agent.act(obs, ALL)
        following = torch.randn(SIZE, generator=generator)
        reward = float(following[0]) + action
        agent.observe(obs, action, reward, following, ALL, terminated=index % 7 == 6, truncated=index % 11 == 10)
        trace += [action, agent.learn()]
        obs = following
    return trace


# ---- choosing an action


@settings(max_examples=30, deadline=None)
@given(
    mask=st.lists(st.booleans(), min_size=ACTIONS, max_size=ACTIONS).filter(any),
    explore=st.booleans(),
    epsilon=st.sampled_from([0.0, 0.5, 1.0]),
    default_action=st.sampled_from([None, 0, 3]),
)
def test_no_action_ever_breaks_the_mask(mask: list[bool], explore: bool, epsilon: float, default_action: int | None):
    agent = make(default_action=default_action, epsilon_start=epsilon, epsilon_end=epsilon)
    for _ in range(4):
        assert mask[agent.act(torch.randn(SIZE), mask, explore)]


def test_exploration_reaches_every_allowed_action():
    agent = make(epsilon_start=1.0, epsilon_end=1.0)
    assert {agent.act(torch.zeros(SIZE), [True, False, True, True]) for _ in range(100)} == {0, 2, 3}


def test_epsilon_falls_linearly_with_observed_steps():
    agent = make(epsilon_start=0.5, epsilon_end=0.1, epsilon_steps=4)
    seen = [agent.epsilon]
    for _ in range(6):
        agent.observe(torch.zeros(SIZE), 0, 0.0, torch.zeros(SIZE), ALL, False, False)
        seen.append(agent.epsilon)
    assert seen == pytest.approx([0.5, 0.4, 0.3, 0.2, 0.1, 0.1, 0.1])


def test_without_a_default_the_best_mean_is_taken():
    agent = with_values([[0.0, 5.0, 1.0, 2.0], [0.0, -5.0, 1.0, 2.0]])
    assert agent.act(torch.zeros(SIZE), ALL, explore=False) == 3
    assert agent.act(torch.zeros(SIZE), [True, True, True, False], explore=False) == 2


def test_the_lower_bound_equals_the_one_computed_by_hand():
    values = torch.tensor([[1.0, 2.0, 1.0], [3.0, 6.0, 3.0]])
    # Gains over action 0: (1, 3) for action 1, mean 2, sample std √2; (0, 0) for action 2.
    assert lower_bounds(values, 0, k=1.0).tolist() == pytest.approx([0.0, 2.0 - math.sqrt(2.0), 0.0])
    assert lower_bounds(values[:1], 0, k=1.0).tolist() == [0.0, 1.0, 0.0]


def test_the_default_stays_while_members_disagree_and_goes_when_they_agree():
    disagree = with_values([[0.0, 3.0, 0.0, 0.0], [0.0, -1.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]], default_action=0)
    agree = with_values([[0.0, 1.1, 0.0, 0.0], [5.0, 5.9, 5.0, 5.0], [-5.0, -4.0, -5.0, -5.0]], default_action=0)
    brave = with_values([[0.0, 3.0, 0.0, 0.0], [0.0, -1.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]], default_action=0, k=0.0)
    assert disagree.act(torch.zeros(SIZE), ALL, explore=False) == 0
    assert agree.act(torch.zeros(SIZE), ALL, explore=False) == 1
    assert brave.act(torch.zeros(SIZE), ALL, explore=False) == 1


def test_a_tie_keeps_the_default_and_a_masked_default_is_left():
    agent = with_values([[1.0, 1.0, 1.0, 0.0]] * 2, default_action=2)
    assert agent.act(torch.zeros(SIZE), ALL, explore=False) == 2
    assert agent.act(torch.zeros(SIZE), [False, False, False, True], explore=False) == 3


# ---- the maths of an update


def transitions(**columns: Tensor) -> Batch:
    """Two transitions: the first goes on, the second is terminal."""
    batch = Batch(
        obs=torch.zeros(2, 1),
        action=torch.tensor([0, 1]),
        ret=torch.tensor([1.0, 2.0]),
        discount=torch.tensor([0.5, 0.5]),
        next_obs=torch.zeros(2, 1),
        next_mask=torch.tensor([[True, True, False], [True, True, True]]),
        terminal=torch.tensor([False, True]),
    )
    return batch._replace(**columns)


def test_targets_equal_those_computed_by_hand():
    target = torch.tensor([[10.0, 4.0, 99.0], [7.0, 7.0, 7.0]])
    online = torch.tensor([[1.0, 2.0, 50.0], [0.0, 0.0, 0.0]])
    # Double: the online network picks action 1 (2 is masked), the target network says 4: 1 + 4/2. Plain: 1 + 10/2.
    assert td_target(transitions(), target, online).tolist() == [3.0, 2.0]
    assert td_target(transitions(), target, target).tolist() == [6.0, 2.0]


def test_a_terminal_target_ignores_what_follows():
    batch = transitions(next_mask=torch.zeros(2, 3, dtype=torch.bool), terminal=torch.tensor([True, True]))
    assert td_target(batch, torch.full((2, 3), math.inf), torch.zeros(2, 3)).tolist() == [1.0, 2.0]


@pytest.mark.parametrize(("double", "wanted"), [(True, 3.0), (False, 6.0)])
def test_an_update_reports_the_huber_loss_to_the_target(double: bool, wanted: float):
    agent = DQN(
        Constant, SIZE, ACTIONS, DQNConfig(gamma=0.5, n_step=1, double=double, learning_starts=1, ensemble=2), seed=0
    )
    biases = {"online": [1.0, 2.0, 50.0, 0.0], "target": [10.0, 4.0, 99.0, 0.0]}
    with torch.no_grad():
        for name, bias in biases.items():
            agent.get_parameter(f"{name}.out.bias").copy_(torch.tensor(bias).expand(2, 1, -1))
    agent.observe(torch.zeros(SIZE), 0, 1.0, torch.zeros(SIZE), [True, True, False, True], False, False)
    # Q(s, 0) = 1; the error e exceeds δ = 1, where the Huber loss is |e| − 1/2.
    assert agent.learn() == pytest.approx(abs(wanted - 1.0) - 0.5)


def test_the_conservative_penalty_equals_the_one_computed_by_hand():
    values = torch.tensor([[0.0, math.log(3.0)]])
    assert conservative_penalty(values, torch.tensor([0])).item() == pytest.approx(math.log(4.0))


def test_the_conservative_term_lowers_unseen_actions():
    def unseen_minus_seen(conservative: float) -> float:
        agent = make(conservative=conservative, n_step=1, learning_rate=1e-2)
        obs = torch.ones(SIZE)
        for _ in range(20):
            agent.observe(obs, 1, 1.0, obs, ALL, terminated=True, truncated=False)
        for _ in range(100):
            agent.learn()
        values = agent.q_values(obs).mean(dim=0)
        return float(values[[0, 2, 3]].max() - values[1])

    assert unseen_minus_seen(1.0) < unseen_minus_seen(0.0) - 0.5


def test_the_gradient_is_clipped_before_the_step():
    # Adam divides any common factor out again, but not its ε: a gradient clipped to far below ε hardly moves a weight.
    agent = make(max_grad_norm=1e-12)
    play(agent, 3)
    before = copy.deepcopy(agent.online.state_dict())
    play(agent, 3)
    moved = max((value - before[name]).abs().max().item() for name, value in agent.online.state_dict().items())
    assert agent.updates > 0
    assert moved < 1e-6


# ---- bookkeeping


def test_target_networks_sync_at_exactly_every_nth_update():
    agent = make(target_sync=5)
    play(agent, 3)
    start = copy.deepcopy(agent.target.state_dict())
    for update in range(1, 13):
        while agent.updates < update:
            play(agent, 1)
        own, copied = agent.online.state_dict(), agent.target.state_dict()
        assert all(torch.equal(own[name], copied[name]) for name in own) == (update % 5 == 0)
        assert all(torch.equal(start[name], copied[name]) for name in start) == (update < 5)
        assert agent.syncs == update // 5


def test_nothing_is_learned_before_learning_starts():
    agent = make(learning_starts=10, n_step=1)
    losses = play(agent, 12)[1::2]
    assert losses[:9] == [None] * 9
    assert None not in losses[9:]
    assert (agent.transitions, agent.updates) == (12, 3)


def test_members_start_apart_and_learn_from_different_draws():
    agent = make(n_step=1)
    weight = agent.online.get_parameter("hidden.weight")
    assert not torch.equal(weight[0], weight[1])
    with torch.no_grad():
        for parameter in agent.online.parameters():
            parameter.copy_(parameter[:1].expand_as(parameter))
    agent.sync_target()
    play(agent, 20)
    assert not torch.equal(weight[0], weight[1])


# ---- determinism and state


def test_the_same_seed_gives_the_same_bits_and_another_seed_others():
    first, again, other = make(seed=3), make(seed=3), make(seed=4)
    assert play(first, 40) == play(again, 40)
    assert play(other, 40) != play(make(seed=3), 40)
    assert torch.equal(first.online.get_parameter("out.weight"), again.online.get_parameter("out.weight"))


def test_the_global_generator_is_neither_used_nor_disturbed():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    trace = play(make(default_action=0), 30)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert play(make(default_action=0), 30) == trace


@pytest.mark.parametrize("steps", [0, 2, 37])
def test_a_saved_agent_continues_bit_for_bit(steps: int):
    agent, resumed = make(seed=1, target_sync=6, capacity=20), make(seed=2, target_sync=6, capacity=20)
    play(agent, steps)
    play(resumed, 9, seed=5)  # whatever it held before must leave no trace
    file = io.BytesIO()
    torch.save(agent.state_dict(), file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert play(agent, 25, seed=8) == play(resumed, 25, seed=8)
    saved, loaded = agent.state_dict(), resumed.state_dict()
    assert all(torch.equal(saved[name], loaded[name]) for name in saved if not name.endswith("_extra_state"))
    counters = ("transitions", "updates", "syncs", "last_loss", "loss_ema")
    assert [getattr(agent, name) for name in counters] == [getattr(resumed, name) for name in counters]


def test_a_loaded_agent_shares_nothing_with_its_source():
    agent, twin = make(), make()
    play(agent, 20)
    twin.load_state_dict(agent.state_dict())
    expected = copy.deepcopy(agent)
    play(twin, 20)
    assert play(agent, 20) == play(expected, 20)


def test_the_agent_minds_neither_autocast_nor_gradient_mode_nor_defaults():
    expected = play(make(), 20)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            agent = make()
            torch.set_default_dtype(torch.float32)  # the made-up observations are to be the same
            assert play(agent, 20)[1::2][-1] is not None
            assert {value.dtype for value in agent.online.parameters()} == {torch.float32}
            assert play(make(), 20) == expected
    finally:
        torch.set_default_dtype(torch.float32)


# ---- what is refused


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_by_name_and_not_stored(bad: float):
    agent, good = make(n_step=1), [0.0] * SIZE
    spoilt = [0.0, bad, 0.0]
    with pytest.raises(ValueError, match=r"^reward"):
        agent.observe(good, 0, bad, good, ALL, False, False)
    with pytest.raises(ValueError, match=r"^obs"):
        agent.observe(spoilt, 0, 0.0, good, ALL, False, False)
    with pytest.raises(ValueError, match=r"^next_obs"):
        agent.observe(good, 0, 0.0, spoilt, ALL, False, False)
    with pytest.raises(ValueError, match=r"^observation"):
        agent.act(spoilt, ALL)
    assert (agent.transitions, len(agent.replay)) == (0, 0)


def test_large_finite_observations_are_accepted():
    make().act([3e38, 3e38, 0.0], ALL)  # their sum overflows, they do not


def test_wrong_masks_actions_and_shapes_are_refused():
    agent, obs = make(), torch.zeros(SIZE)
    nothing = torch.zeros(ACTIONS, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"^mask allows no action"):
        agent.act(obs, nothing)
    with pytest.raises(ValueError, match=r"^next_mask allows no action"):
        agent.observe(obs, 0, 0.0, obs, nothing, False, True)
    with pytest.raises(ValueError, match="mask must have shape"):
        agent.act(obs, [True])
    with pytest.raises(ValueError, match="observation must have shape"):
        agent.q_values(torch.zeros(SIZE + 1))
    with pytest.raises(ValueError, match="action must lie"):
        agent.observe(obs, ACTIONS, 0.0, obs, ALL, False, False)
    agent.observe(obs, 0, 0.0, obs, nothing, True, False)  # after the end nothing need be allowed
    assert agent.transitions == 1


def test_a_network_or_default_action_that_does_not_fit_is_refused():
    def build(make_network: Any, default_action: int | None = None) -> DQN:
        return DQN(make_network, SIZE, ACTIONS, DQNConfig(), seed=0, default_action=default_action)

    with pytest.raises(ValueError, match="must map"):
        build(lambda: MLPQ(SIZE, ACTIONS + 1))
    with pytest.raises(ValueError, match="batch dimension"):
        build(lambda: nn.Sequential(nn.Linear(SIZE, ACTIONS), nn.Softmax(dim=0)))
    with pytest.raises(ValueError, match="default_action"):
        build(lambda: MLPQ(SIZE, ACTIONS), default_action=ACTIONS)


@pytest.mark.parametrize(
    ("name", "value"), [("gamma", 1.1), ("ensemble", 0), ("epsilon_end", -0.1), ("conservative", -1.0), ("huber", 0.0)]
)
def test_settings_out_of_range_are_refused_by_name(name: str, value: Any):
    with pytest.raises(ValueError, match=name):
        DQNConfig(**{name: value})


# ---- problems with a known answer


def load_chain() -> ModuleType:
    """The chain of the learning-curve benchmark, so that the figure and the test speak of one problem."""
    path = Path(__file__).parents[1] / "benchmarks" / "monitor_learning_curve.py"
    spec = importlib.util.spec_from_file_location("monitor_learning_curve", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


chain = load_chain()
# By hand: out on the right is worth 0.9^(5 − s), out on the left 0.65 · 0.9^s; only state 0 should turn left.
BEST = [0.65] + [0.9 ** (5 - state) for state in range(1, 6)]
POLICY = [0, 1, 1, 1, 1, 1]


def test_value_iteration_finds_the_values_computed_by_hand():
    exact = chain.exact_values()
    assert exact.max(dim=1).values.tolist() == pytest.approx(BEST)
    assert exact.argmax(dim=1).tolist() == POLICY


def test_the_chain_is_solved_to_its_exact_values():
    rows = chain.run(seed=0, updates=600)
    _, updates, loss, error, held, syncs, optimal = rows[-1]
    assert (updates, syncs, optimal) == (600, 600 // chain.CONFIG.target_sync, 1)
    assert error < 0.02
    assert loss < 0.05 * rows[1][2]
    assert [row[4] for row in rows] == sorted(row[4] for row in rows)
    assert held > 600


def test_the_benchmark_writes_its_table_and_figure(tmp_path: Path):
    assert chain.main(["--output", str(tmp_path), "--seeds", "0", "1", "--updates", "20"]) == 0
    lines = (tmp_path / "monitor_learning.csv").read_text().splitlines()
    assert lines[0] == "seed,updates,loss,max_error,replay_size,syncs,greedy_is_optimal"
    assert [line.split(",")[:2] for line in lines[1:]] == [[s, u] for s in "01" for u in ("0", "20")]
    assert (tmp_path / "monitor_learning.png").stat().st_size > 10_000


def test_a_network_trained_on_three_terms_finds_the_term_to_raise_among_five():
    """The reward says to raise the one term whose feature is 1; which one changes at every step."""

    def build(terms: int, seed: int) -> DQN:
        config = DQNConfig(n_step=1, learning_rate=3e-3, epsilon_start=1.0, epsilon_end=1.0, learning_starts=32)
        make_network = lambda: EquivariantQ(1, 1, hidden=16)  # noqa: E731
        return DQN(make_network, 1 + terms, 2 + 2 * terms, config, seed=seed, default_action=0)

    def situation(terms: int, lit: int) -> Tensor:
        return torch.tensor([0.5] + [float(term == lit) for term in range(terms)])

    agent = build(3, seed=0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(400):
        lit = int(torch.randint(3, (), generator=generator))
        action = agent.act(situation(3, lit), [True] * 8)
        moved = action >= 2
        reward = 1.0 if action == 2 + 2 * lit else -1.0 if moved else 0.0
        agent.observe(situation(3, lit), action, reward, situation(3, lit), [True] * 8, True, False)
        agent.learn()
    wider = build(5, seed=1)
    wider.online.load_state_dict(agent.online.state_dict())
    for lit in range(3):
        assert agent.act(situation(3, lit), [True] * 8, explore=False) == 2 + 2 * lit
    for lit in range(5):
        assert wider.act(situation(5, lit), [True] * 12, explore=False) == 2 + 2 * lit


def test_another_implementation_finds_the_same_policy():
    gymnasium = pytest.importorskip("gymnasium")
    peer = pytest.importorskip("stable_baselines3")

    class ChainEnv(gymnasium.Env):
        observation_space = gymnasium.spaces.Box(0.0, 1.0, (chain.N_STATES,))
        action_space = gymnasium.spaces.Discrete(2)

        def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
            super().reset(seed=seed)
            self.state, self.moves = int(self.np_random.integers(chain.N_STATES)), 0
            return self._seen(), {}

        def step(self, action: int):
            self.state, reward, terminated = chain.step(self.state, int(action))
            self.moves += 1
            return self._seen(), reward, terminated, self.moves == chain.MAX_EPISODE, {}

        def _seen(self):
            return torch.eye(chain.N_STATES)[self.state].numpy()

    torch.set_num_threads(1)
    model = peer.DQN(
        "MlpPolicy", ChainEnv(), gamma=chain.GAMMA, learning_rate=3e-3, learning_starts=100, train_freq=1, seed=0,
        target_update_interval=25, exploration_initial_eps=1.0, exploration_final_eps=0.5, device="cpu",
        policy_kwargs={"net_arch": [32]},
    )  # fmt: skip
    model.learn(1500)
    with torch.no_grad():
        theirs = model.q_net(torch.eye(chain.N_STATES))
    assert theirs.argmax(dim=1).tolist() == POLICY
