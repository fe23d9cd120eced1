"""Does the monitor's Deep Q-network learn? A chain of six states whose exact values are known.

From state s, *right* leads to s + 1 and out of the last state to the goal, reward 1; *left* leads to s − 1 and out of
the first state to a nearer, smaller reward of 0.65. With γ = 0.9 only state 0 should turn left. Each run writes its
temporal-difference loss, the largest error max |Q − Q*|, the replay's size and the target syncs.

Run from a checkout, about half a minute on one core:

    python benchmarks/monitor_learning_curve.py --output docs/results
"""

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from adaptive_loss.rl.dqn import DQN, DQNConfig
from adaptive_loss.rl.networks import MLPQ

if TYPE_CHECKING:
    from matplotlib.axes import Axes

N_STATES = 6
LEFT, RIGHT = 0, 1
GAMMA = 0.9
SMALL_REWARD = 0.65
MAX_EPISODE = 20
CONFIG = DQNConfig(
    gamma=GAMMA, n_step=1, learning_rate=3e-3, target_sync=25, epsilon_start=1.0, epsilon_end=0.3, epsilon_steps=500
)
COLUMNS = ("seed", "updates", "loss", "max_error", "replay_size", "syncs", "greedy_is_optimal")
Row = tuple[int, int, float, float, int, int, int]


def step(state: int, action: int) -> tuple[int, float, bool]:
    """One move of the chain: (next state, reward, terminated)."""
    following = state + (1 if action == RIGHT else -1)
    if following < 0:
        return 0, SMALL_REWARD, True
    if following == N_STATES:
        return N_STATES - 1, 1.0, True
    return following, 0.0, False


def exact_values() -> Tensor:
    """[S, A] Q*(s, a) = r + γ max_b Q*(s', b), by value iteration to the fixed point."""
    values = torch.zeros(N_STATES, 2)
    for _ in range(2 * N_STATES):
        best = values.max(dim=1).values.tolist()
        moves = [[step(state, action) for action in (LEFT, RIGHT)] for state in range(N_STATES)]
        values = torch.tensor([[r + GAMMA * best[s] * (not done) for s, r, done in row] for row in moves])
    return values


def make_agent(seed: int, config: DQNConfig = CONFIG) -> DQN:
    """A Deep Q-network on one-hot states."""
    return DQN(lambda: MLPQ(N_STATES, 2), N_STATES, 2, config, seed=seed)


def agent_values(agent: DQN) -> Tensor:
    """[S, A] ensemble mean of the agent's values in every state."""
    return torch.stack([agent.q_values(state).mean(dim=0) for state in torch.eye(N_STATES)])


def measure(agent: DQN, seed: int, exact: Tensor) -> Row:
    """One line of the results."""
    values = agent_values(agent)
    optimal = bool((values.argmax(dim=1) == exact.argmax(dim=1)).all())
    error = float((values - exact).abs().max())
    loss = agent.loss_ema if agent.loss_ema is not None else float("nan")
    return seed, agent.updates, loss, error, len(agent.replay), agent.syncs, int(optimal)


def run(seed: int, updates: int, every: int = 20) -> list[Row]:
    """Train one agent for so many updates, measuring every `every` of them."""
    agent, exact = make_agent(seed), exact_values()
    starts = torch.Generator().manual_seed(seed)
    states, allowed = torch.eye(N_STATES), torch.ones(2, dtype=torch.bool)
    rows = [measure(agent, seed, exact)]
    while agent.updates < updates:
        state, terminated = int(torch.randint(N_STATES, (), generator=starts)), False
        for move in range(MAX_EPISODE):
            action = agent.act(states[state], allowed)
            following, reward, terminated = step(state, action)
            truncated = move == MAX_EPISODE - 1
            agent.observe(states[state], action, reward, states[following], allowed, terminated, truncated)
            if agent.learn() is not None and agent.updates % every == 0:
                rows.append(measure(agent, seed, exact))
            if terminated or agent.updates == updates:
                break
            state = following
    return rows


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Write the measurements, one line each."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows([f"{value:.6g}" if isinstance(value, float) else value for value in row] for row in rows)


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draw every measurement against the updates: median over the seeds, band from the lowest to the highest."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, ((loss, error), (count, policy)) = plt.subplots(2, 2, figsize=(10, 7), sharex=True, layout="constrained")
    _band(loss, rows, "loss", "C0", "moving average of the loss")
    loss.set(yscale="log", title="The loss falls", ylabel="Huber loss")
    _band(error, rows, "max_error", "C1", "largest error")
    certain = float(exact_values().diff(dim=1).abs().min()) / 2
    error.axhline(certain, color="black", linewidth=1, linestyle=":", label="below this the policy must be optimal")
    error.set(yscale="log", title="The values approach the exact ones", ylabel="max |Q − Q*|")
    _band(count, rows, "replay_size", "C2", "transitions in the replay")
    _band(count, rows, "syncs", "C4", "target syncs")
    count.set(yscale="symlog", title="The replay fills, the targets sync", ylabel="count", xlabel="updates")
    updates, optimal = _by_update(rows, "greedy_is_optimal")
    policy.step(updates, optimal.mean(dim=0), color="C3", where="post", label="share of seeds")
    policy.set(ylim=(-0.05, 1.05), title="The greedy policy becomes optimal", ylabel="share of seeds", xlabel="updates")
    for axis in (loss, error, count, policy):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=9)
    seeds = len({row[0] for row in rows})
    figure.suptitle(f"Deep Q-network on a six-state chain: median of {seeds} seeds, band from lowest to highest")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _by_update(rows: Sequence[Row], column: str) -> tuple[list[int], Tensor]:
    index = COLUMNS.index(column)
    seeds = sorted({row[0] for row in rows})
    updates = [row[1] for row in rows if row[0] == seeds[0]]
    return updates, torch.tensor([[float(row[index]) for row in rows if row[0] == seed] for seed in seeds])


def _band(axis: "Axes", rows: Sequence[Row], column: str, color: str, label: str) -> None:
    updates, values = _by_update(rows, column)
    axis.plot(updates, values.median(dim=0).values, color=color, label=label)
    axis.fill_between(updates, values.amin(dim=0), values.amax(dim=0), color=color, alpha=0.25)


def main(argv: Sequence[str] | None = None) -> int:
    """Train, write `monitor_learning.csv` and `.png`, print the last line of every seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/results"), help="folder for the table and the figure")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--updates", type=int, default=1500, help="updates per seed")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    runs = [run(seed, arguments.updates) for seed in arguments.seeds]
    rows = [row for one in runs for row in one]
    arguments.output.mkdir(parents=True, exist_ok=True)
    write_csv(rows, arguments.output / "monitor_learning.csv")
    plot(rows, arguments.output / "monitor_learning.png")
    for one in runs:
        print(" ".join(f"{name}={value:.4g}" for name, value in zip(COLUMNS, one[-1], strict=True)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
