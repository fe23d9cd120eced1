"""Another library's learner on the environment in which the monitor is trained, with nothing changed.

Needs the extra `rl`. Run from anywhere, a minute or two:

    python examples/stable_baselines3_dqn.py
"""

from __future__ import annotations

import statistics

import gymnasium
from stable_baselines3 import DQN

import adaptive_loss  # noqa: F401 - tells Gymnasium of the environment


def gain(env: gymnasium.Env, agent: DQN | None, seed: int) -> float:
    """What one run won over keeping, summed over its decisions; without an agent it keeps."""
    observation, _ = env.reset(seed=seed)
    total, over = 0.0, False
    while not over:
        action = 0 if agent is None else int(agent.predict(observation, deterministic=True)[0])
        observation, reward, over, _, _ = env.step(action)
        total += float(reward)
    return total


def main(decisions: int = 400, judged: int = 10) -> None:
    """Train, and compare with never nudging on runs of other seeds."""
    env = gymnasium.make("adaptive_loss/LossWeighting-v0", family="multitask", steps=100)
    agent = DQN("MlpPolicy", env, learning_starts=50, target_update_interval=50, train_freq=1, gamma=1.0, seed=0)
    agent.learn(decisions)
    for name, who in (("never nudged", None), ("stable-baselines3", agent)):
        found = [gain(env, who, seed) for seed in range(1000, 1000 + judged)]
        print(f"{name:<18} mean gain {statistics.fmean(found):+.4f} over {judged} runs")


if __name__ == "__main__":
    main()
